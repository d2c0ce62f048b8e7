"""SimPO, AlphaPO, CPO and ORPO: formulas, limits, clamps, close means."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import alphapo_loss, cpo_loss, orpo_loss, simpo_loss
from jaxdpo.losses.reference_free import MAX_MEAN_LOGP, MAX_POWER
from jaxdpo.types import InputError

LENGTHS = np.random.default_rng(1).integers(1, 40, (6, 2))
LOGPS = (-3 * np.random.default_rng(0).random((6, 2)) * LENGTHS).astype(np.float32)
MEANS = LOGPS.astype(np.float64) / LENGTHS
ALL = [simpo_loss, alphapo_loss, cpo_loss, orpo_loss]
RTOL = 3e-6
"""Margins of a few nats round by 2.4e-7 in float32, and the loss relatively by a few times that."""


def cross_entropy(logit, label_smoothing=0.0):
    return (1 - label_smoothing) * np.log1p(np.exp(-logit)) + label_smoothing * np.log1p(np.exp(logit))


def summed(loss, **options):
    return lambda logps: loss(logps, **options).sum()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_simpo_compares_means_with_a_margin(label_smoothing):
    actual = simpo_loss(LOGPS, lengths=LENGTHS, beta=2.0, simpo_gamma=1.2, label_smoothing=label_smoothing)
    expected = cross_entropy(2.0 * (MEANS[:, 0] - MEANS[:, 1]) - 1.2, label_smoothing)
    np.testing.assert_allclose(actual, expected, rtol=RTOL)


@pytest.mark.parametrize("alpha", [-0.5, 0.01, 0.25, 1.0])
def test_alphapo_bends_the_reward(alpha):
    actual = alphapo_loss(LOGPS, lengths=LENGTHS, beta=2.0, simpo_gamma=1.2, alphapo_alpha=alpha, label_smoothing=0.1)
    rewards = (1 - np.exp(-alpha * MEANS)) / alpha
    np.testing.assert_allclose(actual, cross_entropy(2.0 * (rewards[:, 0] - rewards[:, 1]) - 1.2, 0.1), rtol=RTOL)


def test_alphapo_without_bend_is_simpo():
    options = {"lengths": LENGTHS, "beta": 2.0}
    simpo = simpo_loss(LOGPS, **options)
    np.testing.assert_array_equal(alphapo_loss(LOGPS, alphapo_alpha=0.0, **options), simpo)
    np.testing.assert_allclose(alphapo_loss(LOGPS, alphapo_alpha=1e-6, **options), simpo, rtol=2e-5)
    gradients = [
        jax.grad(summed(loss, **options))(LOGPS)
        for loss in (simpo_loss, functools.partial(alphapo_loss, alphapo_alpha=0.0))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-6)


def test_a_sweep_of_alpha_through_zero_compiles_once():
    traces = []

    @jax.jit
    def loss(alpha):
        traces.append(1)
        return alphapo_loss(LOGPS, lengths=LENGTHS, alphapo_alpha=alpha)

    for alpha in (-0.25, 0.0, 0.25):
        expected = alphapo_loss(LOGPS, lengths=LENGTHS, alphapo_alpha=alpha)
        np.testing.assert_allclose(loss(alpha), expected, rtol=RTOL)
    assert len(traces) == 1


def test_alphapo_has_no_gradient_where_its_power_is_clamped():
    logps = jnp.array([[-400.0, -300.0], [-2.0, -300.0]])  # e^100 and e^75, e^0.5 and e^75
    value, gradient = jax.value_and_grad(summed(alphapo_loss, lengths=jnp.ones((2, 2)), simpo_gamma=0.5))(logps)
    np.testing.assert_array_equal(gradient[0], [0, 0])
    np.testing.assert_array_equal(gradient[1, 1], 0)
    lone = alphapo_loss(logps[:1], lengths=jnp.ones((1, 2)), simpo_gamma=0.5)
    np.testing.assert_allclose(lone, cross_entropy(np.array([-0.5])), rtol=RTOL)
    np.testing.assert_allclose(value, cross_entropy(-0.5), rtol=RTOL)  # the second pair's reward is far enough apart
    assert np.exp(MAX_POWER) ** 2 < np.finfo(np.float32).max


def test_cpo_is_dpo_without_reference_and_fine_tuning():
    actual = cpo_loss(LOGPS, lengths=LENGTHS, beta=0.3, label_smoothing=0.1, cpo_alpha=0.7)
    expected = cross_entropy(0.3 * (LOGPS[:, 0] - LOGPS[:, 1]).astype(np.float64), 0.1)
    expected += 0.7 * -LOGPS[:, 0] / LENGTHS[:, 0].mean()
    np.testing.assert_allclose(actual, expected, rtol=RTOL)


def test_orpo_is_fine_tuning_and_an_odds_ratio():
    odds = np.exp(MEANS) / (1 - np.exp(MEANS))
    expected = -LOGPS[:, 0] / LENGTHS[:, 0].mean() + 0.4 * cross_entropy(np.log(odds[:, 0] / odds[:, 1]))
    np.testing.assert_allclose(orpo_loss(LOGPS, lengths=LENGTHS, beta=0.4), expected, rtol=RTOL)


def test_orpo_where_an_answer_is_certain():
    logps, lengths = jnp.array([[0.0, -2.0]]), jnp.ones((1, 2))
    value, gradient = jax.value_and_grad(summed(orpo_loss, lengths=lengths, beta=1.0))(logps)
    odds_ratio = -np.log(-MAX_MEAN_LOGP) - np.log(np.exp(-2) / (1 - np.exp(-2)))
    np.testing.assert_allclose(value, cross_entropy(odds_ratio), rtol=1e-4)
    np.testing.assert_allclose(gradient[0, 0], -1 - 1 / (1 + np.exp(odds_ratio)), rtol=1e-6)  # that of log(1 - p) is 0
    close = jnp.array([[-2e-7, -2.0]])
    assert jnp.isfinite(jax.grad(summed(orpo_loss, lengths=lengths))(close)).all()


def test_close_means_of_large_log_probabilities_keep_their_digits():
    logps, lengths = np.array([[-3001.0, -5001.75]], np.float32), np.array([[3, 5]])
    gap = logps[0, 0].astype(np.float64) / 3 - logps[0, 1].astype(np.float64) / 5  # 1 / 60: both are about -1000.3
    actual = simpo_loss(logps, lengths=lengths, beta=40.0, simpo_gamma=0.0)
    np.testing.assert_allclose(actual, [cross_entropy(40 * gap)], rtol=1e-6)  # quotients would be off by 3e-5 each


@pytest.mark.parametrize("loss", ALL)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_log_probabilities_are_finite(loss, scale):
    logps = scale * jnp.array([[1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for lengths in (jnp.ones((6, 2)), jnp.full((6, 2), 50)):
        assert jnp.isfinite(loss(logps, lengths=lengths)).all()
        assert jnp.isfinite(jax.grad(summed(loss, lengths=lengths))(logps)).all()


@pytest.mark.parametrize("loss", ALL)
def test_incomplete_pairs_are_silent_whatever_they_hold(loss):
    where = np.array([[True, True], [True, False], [False, True], [False, False], [True, True], [False, False]])
    logps, lengths = np.where(where, LOGPS, np.nan), np.where(where, LENGTHS, 0)
    complete = where.all(axis=-1)
    actual = loss(logps, lengths=lengths, where=where)
    np.testing.assert_allclose(actual[complete], loss(LOGPS[complete], lengths=LENGTHS[complete]), rtol=1e-6)
    np.testing.assert_array_equal(actual[~complete], 0)
    gradient = jax.grad(summed(loss, lengths=lengths, where=where))(logps)
    np.testing.assert_array_equal(gradient[~complete], 0)
    assert (gradient[complete] != 0).all()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (simpo_loss, {"beta": 0}, r"beta=0 is out of range; allowed: above 0"),
        (simpo_loss, {"simpo_gamma": np.inf}, r"simpo_gamma=inf is out of range; allowed: any finite number"),
        (alphapo_loss, {"alphapo_alpha": np.nan}, r"alphapo_alpha=nan is out of range; allowed: any finite number"),
        (alphapo_loss, {"label_smoothing": 0.5}, r"label_smoothing=0.5 is out of range; allowed: 0 to below 0.5"),
        (cpo_loss, {"cpo_alpha": -1}, r"cpo_alpha=-1 is out of range; allowed: 0 or more"),
        (orpo_loss, {"beta": -1}, r"beta=-1 is out of range; allowed: above 0"),
    ],
)
def test_options_out_of_range(loss, options, message):
    with pytest.raises(InputError, match=message):
        loss(LOGPS, lengths=LENGTHS, **options)


@pytest.mark.parametrize("loss", ALL)
def test_pairs_alone(loss):
    with pytest.raises(InputError, match=r"3 candidates .* shape \(1, 3\); allowed: 2"):
        loss(np.zeros((1, 3), np.float32), lengths=np.ones((1, 3)))
