"""Preference metrics: TRL's numbers for pairs, ties one half, rankings, masks."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.losses import preference_metrics

NAMES = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]


def test_pairs_have_the_definitions_of_trl():
    policy, ref = -50 * np.random.default_rng(0).random((2, 3, 4, 2), np.float32)
    rewards = 0.1 * (policy - ref)
    expected = {
        "rewards/chosen": rewards[..., 0],
        "rewards/rejected": rewards[..., 1],
        "rewards/accuracies": rewards[..., 0] > rewards[..., 1],
        "rewards/margins": rewards[..., 0] - rewards[..., 1],
        "logps/chosen": policy[..., 0],
        "logps/rejected": policy[..., 1],
    }
    actual = preference_metrics(policy, ref, beta=0.1)
    assert list(actual) == NAMES
    for name in NAMES:
        assert actual[name].dtype == jnp.float32
        np.testing.assert_allclose(actual[name], expected[name], rtol=1e-5, atol=1e-6)


def test_a_tie_is_half_right():
    logps = jnp.array([[-3.0, -5.0], [-5.0, -3.0]])
    np.testing.assert_array_equal(preference_metrics(logps, logps)["rewards/accuracies"], [0.5, 0.5])


def test_rankings_compare_the_best_with_the_mean_of_the_others():
    metrics = preference_metrics(jnp.array([-2.0, -3.0, -2.0, -1.0]), None, beta=0.5)
    np.testing.assert_array_equal(metrics["rewards/chosen"], -1)
    np.testing.assert_array_equal(metrics["rewards/rejected"], 0.5 * (-3 - 2 - 1) / 3)
    np.testing.assert_array_equal(metrics["rewards/margins"], 0)
    np.testing.assert_array_equal(metrics["rewards/accuracies"], (1 + 0.5 + 0) / 3)
    np.testing.assert_array_equal(metrics["logps/rejected"], -2)


def test_masked_candidates_are_as_good_as_not_there():
    policy = jnp.array([[jnp.nan, -2.0, jnp.inf, -3.0], [-1.0, jnp.nan, jnp.nan, jnp.nan]])
    exists = jnp.array([[False, True, False, True], [True, False, False, False]])
    masked = preference_metrics(policy, policy - 1, where=exists)
    shorter = preference_metrics(jnp.array([-2.0, -3.0]), jnp.array([-3.0, -4.0]))
    for name in NAMES:
        np.testing.assert_array_equal(masked[name], [shorter[name], 0])


def test_extreme_log_probabilities_are_finite_and_jit_agrees():
    policy, ref = jnp.array([[1e4, -1e4], [-1e4, 1e4]]), jnp.array([[-1e4, 1e4], [1e4, -1e4]])
    eager = preference_metrics(policy, ref, beta=0.1)
    np.testing.assert_allclose(eager["rewards/margins"], [4e3, -4e3], rtol=1e-6)
    np.testing.assert_array_equal(eager["rewards/accuracies"], [1, 0])
    jitted = jax.jit(preference_metrics)(policy, ref, beta=0.1)
    for name in NAMES:
        np.testing.assert_allclose(jitted[name], eager[name], rtol=1e-6)
