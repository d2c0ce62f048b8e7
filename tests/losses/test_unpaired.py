"""KTO and BCO: formulas, what is a constant, partners, running means, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxdpo.losses import RunningMean, bco_loss, bco_running, kto_loss, update_running_mean
from jaxdpo.types import InputError

POLICY, REF = -60 * np.random.default_rng(0).random((2, 6, 2), np.float32)
LABEL = np.array([True, False, True, True, False, False])
RATIO = POLICY.astype(np.float64) - REF
ONE = POLICY[:, :1], REF[:, :1]
START = RunningMean(jnp.float32(0), jnp.float32(0))
RTOL = 5e-6
"""Log-ratios of 60 round by 4e-6 in float32; beta makes that 4e-7 in the logit, and the loss relatively no more."""


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def expected_kto(kl, beta=0.1, desirable=1.0, undesirable=1.0):
    above = beta * (RATIO[:, 0] - kl)
    return np.where(LABEL, desirable * (1 - sigmoid(above)), undesirable * (1 - sigmoid(-above)))


def test_kto_measures_from_the_mean_log_ratio_of_partners():
    policy = POLICY + np.array([0, 30], np.float32)  # so that the estimate is above 0
    kl = (RATIO[:, 1] + 30).mean()
    assert kl > 0
    actual = kto_loss(policy, REF, label=LABEL, beta=0.1, desirable_weight=1.5, undesirable_weight=0.7)
    np.testing.assert_allclose(actual, expected_kto(kl, 0.1, 1.5, 0.7), rtol=RTOL)


def test_kto_estimate_is_at_least_zero():
    policy = POLICY - np.array([0, 100], np.float32)
    np.testing.assert_allclose(kto_loss(policy, REF, label=LABEL), expected_kto(0), rtol=RTOL)


def test_kto_takes_an_estimate_that_is_given():
    actual = kto_loss(np.where([True, False], POLICY, np.nan), REF, label=LABEL, kl=7.0, where=[[True, False]] * 6)
    np.testing.assert_allclose(actual, expected_kto(7.0), rtol=RTOL)


def test_kto_labels_may_be_numbers():
    as_numbers = kto_loss(POLICY, REF, label=LABEL.astype(np.float32))
    np.testing.assert_array_equal(as_numbers, kto_loss(POLICY, REF, label=LABEL))


def test_kto_gradient_is_that_of_a_constant_estimate():
    def loss(policy, **options):
        return kto_loss(policy, REF, label=LABEL, **options).sum()

    policy = POLICY + np.array([0, 30], np.float32)
    kl = (policy - REF)[:, 1].mean()
    gradient = jax.grad(loss)(policy)
    np.testing.assert_array_equal(gradient[:, 1], 0)
    np.testing.assert_allclose(gradient, jax.grad(functools.partial(loss, kl=kl))(policy), rtol=1e-5)
    slope = 0.1 * sigmoid(0.1 * (RATIO[:, 0] - kl)) * sigmoid(-0.1 * (RATIO[:, 0] - kl))
    np.testing.assert_allclose(gradient[:, 0], np.where(LABEL, -slope, slope), rtol=1e-5, atol=1e-8)
    by_kl = jax.grad(lambda kl: kto_loss(policy, REF, label=LABEL, kl=kl).sum())(1.0)
    assert by_kl == 0


def test_kto_partners_count_wherever_they_exist():
    where = np.array([[1, 1], [1, 0], [1, 1], [0, 1], [0, 0], [1, 0]], bool)
    policy, ref = (np.where(where, x + np.array([0, 20]) * (x is POLICY), np.nan) for x in (POLICY, REF))
    kl = (RATIO[:, 1] + 20)[where[:, 1]].mean()
    assert kl > 0
    actual = kto_loss(policy, ref, label=LABEL, where=where)
    np.testing.assert_allclose(actual, np.where(where[:, 0], expected_kto(kl), 0), rtol=RTOL)
    gradient = jax.grad(lambda policy: kto_loss(policy, ref, label=LABEL, where=where).sum())(policy)
    np.testing.assert_array_equal(gradient != 0, where & [True, False])


@pytest.mark.parametrize("baseline", [None, 0.4])
def test_bco_is_logistic_regression_on_the_reward(baseline):
    delta = 0.2 * RATIO[:, 0].mean() if baseline is None else baseline
    above = 0.2 * RATIO[:, 0] - delta
    expected = np.log1p(np.exp(np.where(LABEL, -above, above)))
    np.testing.assert_allclose(bco_loss(*ONE, label=LABEL, beta=0.2, baseline=baseline), expected, rtol=RTOL)


def test_bco_gradient_is_that_of_a_constant_baseline():
    def loss(policy, **options):
        return bco_loss(policy, ONE[1], label=LABEL, **options).sum()

    baseline = 0.1 * RATIO[:, 0].mean()
    gradients = [jax.grad(functools.partial(loss, **o))(ONE[0]) for o in ({}, {"baseline": baseline})]
    np.testing.assert_allclose(*gradients, rtol=1e-5)
    assert jax.grad(lambda baseline: loss(ONE[0], baseline=baseline))(0.4) == 0


def test_bco_mean_is_that_of_completions_that_exist():
    where = np.array([1, 1, 0, 1, 0, 0], bool)[:, None]
    policy = np.where(where, ONE[0], np.nan)
    actual = bco_loss(policy, ONE[1], label=LABEL, where=where)
    kept = where[:, 0]
    np.testing.assert_allclose(actual[kept], bco_loss(ONE[0][kept], ONE[1][kept], label=LABEL[kept]), rtol=1e-6)
    np.testing.assert_array_equal(actual[~kept], 0)
    gradient = jax.grad(lambda policy: bco_loss(policy, ONE[1], label=LABEL, where=where).sum())(policy)
    np.testing.assert_array_equal(gradient != 0, where)


def test_running_mean_is_that_of_everything_seen():
    values = np.random.default_rng(3).random((5, 4), np.float32)
    where = np.random.default_rng(4).random((5, 4)) < 0.6
    where[2] = False  # a step in which nothing counts

    def step(state, inputs):
        state = update_running_mean(state, inputs[0], where=inputs[1])
        return state, state

    last, states = jax.lax.scan(step, START, (values, where))
    seen = [values[: n + 1][where[: n + 1]] for n in range(5)]
    np.testing.assert_allclose(states.mean, [x.mean() for x in seen], rtol=1e-6)
    np.testing.assert_array_equal(states.weight, [len(x) for x in seen])
    assert last.mean.dtype == last.weight.dtype == jnp.float32


def test_running_baseline_holds_this_step_too():
    first, second = slice(0, 4), slice(4, 6)
    state = bco_running(START, ONE[0][first], ONE[1][first], beta=0.2)
    state = bco_running(state, ONE[0][second], ONE[1][second], beta=0.2)
    np.testing.assert_allclose(state.mean, 0.2 * RATIO[:, 0].mean(), rtol=RTOL)
    assert state.weight == 6


def test_running_baseline_is_a_constant():
    gradient = jax.grad(lambda policy: bco_running(START, policy, ONE[1]).mean)(ONE[0])
    np.testing.assert_array_equal(gradient, 0)


def test_devices_share_the_baseline():
    policy, ref = -60 * np.random.default_rng(5).random((2, 8, 3, 2), np.float32)
    policy[..., 1] += 20
    label, where = (np.random.default_rng(6).random((8, 3)) < 0.5), np.random.default_rng(7).random(policy.shape) < 0.8

    def losses(policy, ref, label, where, axis_name=None):
        one = policy[..., :1], ref[..., :1]
        kto = kto_loss(policy, ref, label=label, where=where, axis_name=axis_name)
        bco = bco_loss(*one, label=label, where=where[..., :1], axis_name=axis_name)
        state = bco_running(RunningMean(jnp.ones(()), jnp.ones(())), *one, where=where[..., :1], axis_name=axis_name)
        return kto, bco, jnp.broadcast_to(state.mean, kto.shape), jnp.broadcast_to(state.weight, kto.shape)

    split, spec = functools.partial(losses, axis_name="groups"), PartitionSpec("groups")
    mesh = jax.make_mesh((8,), ("groups",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = losses(policy, ref, label, where)
    for mapped in (
        jax.pmap(split, axis_name="groups"),
        jax.jit(jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=spec)),
    ):
        for ours, expected in zip(mapped(policy, ref, label, where), whole, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_without_reference_the_policy_is_measured_alone():
    for loss, candidates in ((kto_loss, 2), (bco_loss, 1)):
        policy = POLICY[:, :candidates]
        np.testing.assert_array_equal(loss(policy, None, label=LABEL), loss(policy, np.zeros_like(policy), label=LABEL))


@pytest.mark.parametrize(("loss", "candidates"), [(kto_loss, 2), (bco_loss, 1)])
def test_extreme_log_probabilities_are_finite(loss, candidates):
    policy = np.full((6, candidates), 1e4, np.float32)
    policy[::2] *= -1
    for sign in (1, -1):
        value, gradient = jax.value_and_grad(lambda policy: loss(policy, -policy, label=LABEL).sum())(sign * policy)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()
    nothing = np.full((6, candidates), np.nan, np.float32)
    silent = loss(nothing, nothing, label=LABEL, where=np.zeros(nothing.shape, bool))
    np.testing.assert_array_equal(silent, np.zeros(6))


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (kto_loss, {"desirable_weight": -1}, r"desirable_weight=-1 is out of range; allowed: 0 or more"),
        (kto_loss, {"undesirable_weight": np.inf}, r"undesirable_weight=inf is out of range; allowed: 0 or more"),
        (kto_loss, {"kl": -0.1}, r"kl=-0.1 is out of range; allowed: 0 or more, in nats"),
        (kto_loss, {"beta": 0}, r"beta=0 is out of range; allowed: above 0"),
        (kto_loss, {"label": POLICY}, r"label has shape \(6, 2\), policy_logps \(6, 2\); allowed: \(6,\)"),
    ],
)
def test_bad_options(loss, options, message):
    with pytest.raises(InputError, match=message):
        loss(POLICY, REF, **{"label": LABEL} | options)


def test_number_of_candidates():
    with pytest.raises(
        InputError, match=r"1 candidates .* \(6, 1\); allowed: 2, a completion and one of another prompt"
    ):
        kto_loss(*ONE, label=LABEL)
    with pytest.raises(InputError, match=r"2 candidates .* \(6, 2\); allowed: 1, a completion; .* bco_pair_loss"):
        bco_loss(POLICY, REF, label=LABEL)
    with pytest.raises(InputError, match=r"baseline=nan is out of range; allowed: any finite reward"):
        bco_loss(*ONE, label=LABEL, baseline=float("nan"))
