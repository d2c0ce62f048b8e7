"""Implicit rewards and DPO: formulas, the closed-form gradient, reference-free form, traced options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import bradley_terry_loss, dpo_loss, implicit_rewards

RTOL = 5e-6
"""Rewards of 0.1 * 60 round by 2.4e-7 in float32, so logits by up to 1e-6, and the loss relatively by no more."""


@pytest.fixture
def logps():
    policy, ref = -60 * np.random.default_rng(0).random((2, 5, 3, 2))
    return policy.astype(np.float32), ref.astype(np.float32)  # [rows, groups, candidates]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


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
    np.testing.assert_array_equal(dpo_loss(*logps, beta=0.1), bradley_terry_loss(rewards))


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
