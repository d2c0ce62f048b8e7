"""Metrics: TRL's numbers for pairs, ties one half, rankings, masks, drift, lengths, judged completions, sums."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.losses import mean_metrics, preference_metrics, unpaired_metrics
from jaxdpo.losses.metrics import CONDITIONAL

NAMES = [
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
]
"""TRL's metrics of pairs."""


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
    assert list(actual)[:6] == NAMES
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
    for name in shorter:
        np.testing.assert_array_equal(masked[name], [shorter[name], 0])


def test_extreme_log_probabilities_are_finite_and_jit_agrees():
    policy, ref = jnp.array([[1e4, -1e4], [-1e4, 1e4]]), jnp.array([[-1e4, 1e4], [1e4, -1e4]])
    eager = preference_metrics(policy, ref, beta=0.1)
    np.testing.assert_allclose(eager["rewards/margins"], [4e3, -4e3], rtol=1e-6)
    np.testing.assert_array_equal(eager["rewards/accuracies"], [1, 0])
    jitted = jax.jit(preference_metrics)(policy, ref, beta=0.1)
    for name in eager:
        assert jnp.isfinite(eager[name]).all()
        np.testing.assert_allclose(jitted[name], eager[name], rtol=1e-6)


def summed(metrics):
    return {name: value.sum() for name, value in metrics.items()}


def test_gradient_weight_is_how_wrong_the_order_is():
    policy, ref = -30 * np.random.default_rng(1).random((2, 20, 2), np.float32)
    rewards = 0.5 * (policy - ref)
    weight = 1 / (1 + np.exp(rewards[:, 0] - rewards[:, 1]))
    metrics = preference_metrics(policy, ref, beta=0.5)
    np.testing.assert_allclose(metrics["rewards/gradient_weight"], weight, rtol=1e-5)
    assert 0 < (weight < 0.01).sum() < 20
    np.testing.assert_array_equal(metrics["rewards/saturated"], weight < 0.01)


def test_divergence_and_drift_of_the_policy():
    policy, ref = jnp.array([-2.0, -3.0, -9.0]), jnp.array([-4.0, -4.0, -6.0])
    metrics = preference_metrics(policy, ref)
    np.testing.assert_allclose(metrics["kl"], (-2 - 1 + 3) / 3, atol=1e-7)
    np.testing.assert_array_equal(metrics["logps/chosen_drift"], 2)
    without = preference_metrics(policy, None)
    assert set(metrics) - set(without) == {"kl", "logps/chosen_drift"}


def test_divergence_is_unbiased_for_samples_of_the_reference():
    ref, policy = np.log([0.2, 0.5, 0.3]), np.log([0.6, 0.3, 0.1])
    first, second = np.meshgrid(np.arange(3), np.arange(3))
    pairs = np.stack([first, second], axis=-1)  # [3, 3, 2] all pairs of draws
    chance = np.exp(ref[pairs].sum(axis=-1))
    estimate = (chance * preference_metrics(policy[pairs], ref[pairs])["kl"]).sum()
    np.testing.assert_allclose(estimate, (np.exp(ref) * (ref - policy)).sum(), rtol=1e-5)


def test_accuracy_by_difference_in_length():
    policy = jnp.array([[-1.0, -2.0], [-2.0, -1.0], [-1.0, -2.0], [-1.0, -1.0], [-2.0, -1.0]])
    lengths = jnp.array([[5, 3], [5, 3], [3, 5], [3, 5], [4, 4]])
    metrics = preference_metrics(policy, None, lengths=lengths)
    np.testing.assert_allclose(metrics["logps_per_token/chosen"], policy[:, 0] / lengths[:, 0], rtol=1e-6)
    np.testing.assert_allclose(metrics["logps_per_token/rejected"], policy[:, 1] / lengths[:, 1], rtol=1e-6)
    means = mean_metrics(summed(metrics), groups=5)
    np.testing.assert_allclose(means["rewards/accuracies"], (1 + 0 + 1 + 0.5 + 0) / 5)
    np.testing.assert_allclose(means["rewards/accuracies_longer"], (1 + 0) / 2)
    np.testing.assert_allclose(means["rewards/accuracies_shorter"], (1 + 0.5) / 2)
    np.testing.assert_allclose([means["chosen_longer"], means["chosen_shorter"]], 2 / 5)


def test_a_ranking_has_shares_of_longer_and_shorter():
    metrics = preference_metrics(jnp.array([-2.0, -3.0, -1.0, -4.0]), None, lengths=jnp.array([4, 3, 3, 9]))
    np.testing.assert_allclose(metrics["chosen_longer"], 2 / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/accuracies_longer"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(mean_metrics(metrics, groups=1)["rewards/accuracies_longer"], 1 / 2, rtol=1e-6)
    np.testing.assert_allclose(mean_metrics(metrics, groups=1)["rewards/accuracies_shorter"], 1, rtol=1e-6)


def test_conditional_metrics_of_no_group_are_zero():
    metrics = preference_metrics(jnp.array([-2.0, -3.0]), None, lengths=jnp.array([4, 3]))
    means = mean_metrics(metrics, groups=1)
    assert means["rewards/accuracies_shorter"] == means["chosen_shorter"] == 0
    assert all(mean == 0 for mean in mean_metrics({name: 0 * x for name, x in metrics.items()}, groups=0).values())


def test_sums_add_up_over_parts():
    policy, ref = -50 * np.random.default_rng(2).random((2, 8, 3, 2), np.float32)
    lengths = np.random.default_rng(3).integers(1, 5, policy.shape)
    where = np.random.default_rng(4).random(policy.shape) < 0.8
    groups = where.all(axis=-1).sum()

    def sums(policy, ref, lengths, where):
        return summed(preference_metrics(policy, ref, lengths=lengths, where=where))

    data = policy, ref, lengths, where
    expected = mean_metrics(sums(*data), groups)
    parts = [sums(*(x[rows] for x in data)) for rows in (slice(0, 5), slice(5, 8))]
    for name, mean in jax.jit(mean_metrics)(jax.tree.map(jnp.add, *parts), groups).items():
        np.testing.assert_allclose(mean, expected[name], rtol=1e-5, atol=1e-6)


def test_conditions_are_metrics_themselves():
    pairs = preference_metrics(np.zeros(2), np.zeros(2), lengths=np.ones(2))
    judged = unpaired_metrics(np.zeros((1, 2)), np.zeros((1, 2)), label=np.ones(1))
    for name, condition in CONDITIONAL.items():
        assert any(name in metrics and condition in metrics for metrics in (pairs, judged))


def test_judged_completions_have_the_means_of_their_kind():
    policy = jnp.array([[-2.0, -5.0], [-3.0, -5.0], [-4.0, jnp.nan], [jnp.nan, -1.0]])
    ref, where = jnp.full((4, 2), -3.0), ~jnp.isnan(policy)
    label = jnp.array([True, False, True, True])
    sums = summed(unpaired_metrics(policy, ref, label=label, beta=0.5, where=where))
    assert (sums["desirable"], sums["undesirable"], sums["mismatched"]) == (2, 1, 3)
    means = mean_metrics(sums, groups=3)
    np.testing.assert_allclose(means["rewards/chosen"], 0.5 * (1 - 1) / 2)
    np.testing.assert_allclose(means["rewards/rejected"], 0)
    np.testing.assert_allclose(means["logps/chosen"], (-2 - 4) / 2)
    np.testing.assert_allclose(means["logps/rejected"], -3)
    np.testing.assert_allclose(means["kl"], 0)  # the mean of -2, -2 and 2 is below
    closer = mean_metrics(summed(unpaired_metrics(policy + 1, ref, label=label, beta=0.5, where=where)), groups=3)
    np.testing.assert_allclose(closer["kl"], (-1 - 1 + 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(closer["rewards/margins"], 0.5 * ((2 + 0) / 2 - 1))


def test_judged_completions_of_one_kind_have_no_margin():
    logps = jnp.array([[-2.0], [-4.0]])
    metrics = unpaired_metrics(logps, logps - 1, label=jnp.array([True, True]), beta=1.0)
    assert "kl" not in metrics
    means = mean_metrics(summed(metrics), groups=2)
    assert (means["rewards/chosen"], means["rewards/rejected"], means["rewards/margins"]) == (1, 0, 0)


def test_what_ties_with_the_best_is_neither_chosen_nor_rejected():
    """Rewards 1 and 2 share the first rank; the first of them beats the only one that is worse."""
    logps, ranks = np.array([1.0, 2.0, 0.0]), np.array([0, 0, 1])
    metrics = preference_metrics(logps, np.zeros(3), beta=1.0, ranks=ranks)
    assert metrics["rewards/accuracies"] == metrics["rewards/margins"] == 1.0
    assert metrics["rewards/rejected"] == 0.0
    untied = preference_metrics(logps, np.zeros(3), beta=1.0, ranks=np.arange(3))
    for name, value in preference_metrics(logps, np.zeros(3), beta=1.0).items():
        np.testing.assert_array_equal(untied[name], value)
