"""Implicit rewards, DPO and its relatives: formulas, the closed-form gradient, reference-free form, traced options."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses.divergences import DIVERGENCES
from jaxdpo.losses.preference import discopop_loss, dpo_loss, hinge_loss, implicit_rewards, robust_dpo_loss
from jaxdpo.losses.reward import bradley_terry_loss
from jaxdpo.types import InputError

RTOL = 5e-6
"""Rewards of 0.1 * 60 round by 2.4e-7 in float32, so logits by up to 1e-6, and the loss relatively by no more."""


@pytest.fixture
def logps():
    policy, ref = -60 * np.random.default_rng(0).random((2, 5, 3, 2))
    return policy.astype(np.float32), ref.astype(np.float32)  # [rows, groups, candidates]


def sigmoid(x):
    return np.exp(-np.logaddexp(0, -x))


def test_implicit_reward_is_beta_times_the_log_ratio(logps):
    policy, ref = logps
    np.testing.assert_allclose(implicit_rewards(policy, ref, beta=0.3), 0.3 * (policy - ref), rtol=1e-6)


def test_implicit_reward_without_reference_is_beta_times_the_log_probability(logps):
    policy, _ = logps
    np.testing.assert_allclose(implicit_rewards(policy, None, beta=0.3), 0.3 * policy, rtol=1e-6)


def test_implicit_reward_of_an_absent_candidate_is_zero_without_gradient():
    policy, ref, exists = jnp.array([-3.0, jnp.nan]), jnp.array([-4.0, jnp.inf]), jnp.array([True, False])
    np.testing.assert_array_equal(implicit_rewards(policy, ref, beta=0.5, where=exists), [0.5, 0])

    def total(policy, ref, beta):
        return implicit_rewards(policy, ref, beta=beta, where=exists).sum()

    by_policy, by_ref, by_beta = jax.grad(total, argnums=(0, 1, 2))(policy, ref, 0.5)
    np.testing.assert_array_equal(by_policy, [0.5, 0])
    np.testing.assert_array_equal(by_ref, [-0.5, 0])
    np.testing.assert_array_equal(by_beta, 1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_dpo_equals_the_formula(logps, label_smoothing):
    policy, ref = logps
    ratio = policy.astype(np.float64) - ref
    logit = 0.1 * (ratio[..., 0] - ratio[..., 1])
    expected = (1 - label_smoothing) * np.log1p(np.exp(-logit)) + label_smoothing * np.log1p(np.exp(logit))
    actual = dpo_loss(policy, ref, beta=0.1, label_smoothing=label_smoothing)
    assert actual.shape == (5, 3)
    np.testing.assert_allclose(actual, expected, rtol=RTOL)


def test_dpo_is_bradley_terry_on_implicit_rewards(logps):
    rewards = implicit_rewards(*logps, beta=0.1)
    np.testing.assert_allclose(dpo_loss(*logps, beta=0.1), bradley_terry_loss(rewards), rtol=RTOL)


def test_reference_free_is_a_reference_that_is_zero(logps):
    policy, _ = logps
    np.testing.assert_array_equal(dpo_loss(policy, None), dpo_loss(policy, np.zeros_like(policy)))


def test_gradient_is_beta_times_the_probability_of_the_wrong_order(logps):
    policy, ref = logps
    rewards = 0.1 * (policy.astype(np.float64) - ref)
    weight = 0.1 * sigmoid(rewards[..., 1] - rewards[..., 0])
    expected = np.stack([-weight, weight], axis=-1)
    by_policy, by_ref = jax.grad(lambda p, r: dpo_loss(p, r, beta=0.1).sum(), argnums=(0, 1))(policy, ref)
    np.testing.assert_allclose(by_policy, expected, rtol=RTOL)
    np.testing.assert_array_equal(by_ref, -by_policy)


def test_a_constant_of_the_prompt_cancels():
    policy, ref = jnp.array([[-30.0, -40.0]]), jnp.array([[-35.0, -38.0]])
    np.testing.assert_allclose(dpo_loss(policy + 16, ref), dpo_loss(policy, ref), rtol=RTOL)


def test_traced_options_compile_once(logps):
    traces = []

    @jax.jit
    def loss(beta, label_smoothing):
        traces.append(1)
        return dpo_loss(*logps, beta=beta, label_smoothing=label_smoothing)

    for beta, label_smoothing in ((0.1, 0.0), (0.3, 0.0), (0.5, 0.2)):
        expected = dpo_loss(*logps, beta=beta, label_smoothing=label_smoothing)
        np.testing.assert_allclose(loss(beta, label_smoothing), expected, rtol=5 * RTOL)  # beta is up to 5 times 0.1
    assert len(traces) == 1


def test_a_sweep_of_beta_is_a_vmap(logps):
    betas = jnp.array([0.05, 0.1, 0.5])
    swept = jax.vmap(lambda beta: dpo_loss(*logps, beta=beta))(betas)
    np.testing.assert_allclose(swept, np.stack([dpo_loss(*logps, beta=b) for b in (0.05, 0.1, 0.5)]), rtol=5 * RTOL)


soft_plus = functools.partial(np.logaddexp, 0)
FORMULAS = {
    dpo_loss: lambda m, label_smoothing=0.0: soft_plus(-m) * (1 - label_smoothing) + soft_plus(m) * label_smoothing,
    hinge_loss: lambda m: np.maximum(0, 1 - m),
    robust_dpo_loss: lambda m, label_smoothing=0.1: (
        (soft_plus(-m) * (1 - label_smoothing) - soft_plus(m) * label_smoothing) / (1 - 2 * label_smoothing)
    ),
    discopop_loss: lambda m, discopop_tau=0.05: (
        soft_plus(-m) * sigmoid(-m / discopop_tau) + np.exp(-m) * sigmoid(m / discopop_tau)
    ),
}
"""Of the margin, one by one from the papers."""
OPTIONS = {
    dpo_loss: [{}, {"label_smoothing": 0.3}],
    hinge_loss: [{}],
    robust_dpo_loss: [{}, {"label_smoothing": 0.0}, {"label_smoothing": 0.45}],
    discopop_loss: [{}, {"discopop_tau": 1.0}, {"discopop_tau": 4.0}],
}
every_loss = pytest.mark.parametrize("loss", FORMULAS)


@every_loss
@pytest.mark.parametrize("beta", [0.01, 0.7])
def test_equals_the_formula_in_float64(loss, beta):
    policy, ref = -60 * np.random.default_rng(0).random((2, 40, 2))
    margin = beta * (policy - ref) @ [1, -1]
    assert margin.min() < -30 * beta and margin.max() > 30 * beta
    with jax.enable_x64(True):
        for options in OPTIONS[loss]:
            actual = loss(policy, ref, beta=beta, **options)
            np.testing.assert_allclose(actual, FORMULAS[loss](margin, **options), rtol=1e-10, atol=1e-13)


@every_loss
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_take_the_place_of_the_log_ratio(loss, name):
    policy, ref = -6 * np.random.default_rng(0).random((2, 40, 2))
    with jax.enable_x64(True):
        scores = np.asarray(DIVERGENCES[name](policy - ref))
        actual = loss(policy, ref, beta=0.3, divergence=DIVERGENCES[name])
    np.testing.assert_allclose(actual, FORMULAS[loss](0.3 * scores @ [1, -1]), rtol=1e-10)


@every_loss
@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_log_probabilities_are_finite(loss, name):
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)))  # [16, 4]
    policy, ref = jnp.concatenate([150 * signs, 1e4 * signs]).reshape(2, 32, 2)
    for options in OPTIONS[loss]:
        run = functools.partial(loss, divergence=DIVERGENCES[name], **options)
        values, pullback = jax.vjp(run, policy, ref)
        assert np.isfinite(values).all()
        assert np.isfinite(pullback(jnp.ones(32))).all()


@every_loss
def test_incomplete_pairs_are_silent_whatever_they_hold(loss):
    policy = jnp.array([[-3.0, -5.0], [-3.0, jnp.nan], [jnp.inf, -5.0], [jnp.nan, jnp.nan]])
    exists = jnp.array([[True, True], [True, False], [False, True], [False, False]])

    def total(policy, ref, beta):
        losses = loss(policy, ref, beta=beta, where=exists)
        return losses.sum(), losses

    grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))
    (_, losses), gradients = grad(policy, policy + 1, 0.5)
    np.testing.assert_allclose(losses[0], loss(policy[0], policy[0] + 1, beta=0.5), rtol=1e-6)
    np.testing.assert_array_equal(losses[1:], 0)
    for gradient in gradients[:2]:
        np.testing.assert_array_equal(gradient[1:], 0)
    assert np.isfinite(gradients[2])


def test_hinge_asks_for_a_margin_and_no_more():
    policy = jnp.array([[-10.0, -30.0], [-10.0, -19.0], [-19.0, -10.0]])
    np.testing.assert_allclose(hinge_loss(policy, None, beta=0.1), [0, 0.1, 1.9], atol=1e-6)
    gradient = jax.jit(jax.grad(lambda p: hinge_loss(p, None, beta=0.1).sum()))(policy)
    np.testing.assert_allclose(gradient, [[0, 0], [-0.1, 0.1], [-0.1, 0.1]], rtol=1e-6)


def test_robust_dpo_is_unbiased_under_flips(logps):
    policy, ref = logps
    right = robust_dpo_loss(policy, ref, label_smoothing=0.2)
    flipped = robust_dpo_loss(policy[..., ::-1], ref[..., ::-1], label_smoothing=0.2)
    np.testing.assert_allclose(0.8 * right + 0.2 * flipped, dpo_loss(policy, ref), rtol=RTOL, atol=RTOL)


def test_discopop_blends_a_logistic_and_an_exponential_loss():
    margin = jnp.array([-3.0, 3.0])
    losses = discopop_loss(jnp.stack([margin, jnp.zeros(2)], axis=-1), None, beta=1.0)
    np.testing.assert_allclose(losses, [np.log1p(np.exp(3)), np.exp(-3)], rtol=1e-6)


def test_discopop_has_a_local_minimum_where_the_order_is_wrong():
    slope = jax.jit(jax.vmap(jax.grad(lambda m: discopop_loss(jnp.array([1.0, 0.0]) * m, None, beta=1.0))))
    np.testing.assert_array_equal(np.sign(slope(jnp.array([-0.2, -0.13, -0.11, 0.0, 0.1]))), [-1, -1, 1, 1, -1])


@pytest.mark.parametrize("discopop_tau", [0, -1.0, float("inf")])
def test_temperature_out_of_range(discopop_tau):
    with pytest.raises(InputError, match=r"discopop_tau=\S+ is out of range; allowed: above 0"):
        discopop_loss(jnp.zeros(2), None, discopop_tau=discopop_tau)


@every_loss
def test_three_candidates_are_refused(loss):
    with pytest.raises(InputError, match=r"3 candidates .* allowed: 2, chosen then rejected"):
        loss(jnp.zeros(3), None)
