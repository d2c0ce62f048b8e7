"""Plackett-Luce: formulas, probabilities over all orders, its case of two, ragged rankings, ties and top k."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import (
    DIVERGENCES,
    bradley_terry_loss,
    dpo_loss,
    implicit_rewards,
    plackett_luce_dpo_loss,
    plackett_luce_loss,
)
from jaxdpo.types import UNRANKED, InputError
from tests.losses.table_rows import UNOPTIMIZED

compiled_loss = jax.jit(plackett_luce_loss)
"""One program for each shape, instead of one for each of its operations."""
PARTIAL = np.array(
    [
        [2, 0, 3, 1],  # an order, but not best first
        [40, -7, 41, 3],  # gaps between ranks
        [0, 0, 1, 2],  # a tie at the top
        [2, 1, 0, 1],  # in the middle
        [0, 2, 1, 2],  # at the bottom
        [1, 0, 1, 0],  # two ties
        [0, 1, 0, 0],  # three tied
        [5, 5, 5, 5],  # all tied
        [UNRANKED, UNRANKED, 0, UNRANKED],  # top 1
        [UNRANKED, 1, 0, UNRANKED],  # top 2
        [0, UNRANKED, 0, UNRANKED],  # top 2, tied
        [UNRANKED, UNRANKED, UNRANKED, UNRANKED],  # nothing observed
    ]
)
"""Ranks of four candidates."""


def softmax(r):
    return np.exp(r - r.max()) / np.exp(r - r.max()).sum()


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def losses_and_gradient(rewards, **options):
    """Loss of every group, and the gradient of their sum."""

    def total(rewards):
        losses = plackett_luce_loss(rewards, **options)
        return losses.sum(), losses

    gradient, losses = jax.grad(total, has_aux=True)(rewards)
    return losses, gradient


def by_enumeration(rewards, ranks):
    """Loss and gradient of one group as sums over all orders in which the ranks do not fall, draw by draw."""
    likelihood, slope = 0.0, np.zeros(len(rewards))
    for order in itertools.permutations(range(len(rewards))):
        if any(ranks[better] > ranks[worse] for better, worse in itertools.pairwise(order)):
            continue
        probability, order_slope = 1.0, np.zeros(len(rewards))
        for k in range(len(order)):
            left = list(order[k:])
            chances = softmax(rewards[left])
            probability *= chances[0]
            order_slope[left] += chances
            order_slope[order[k]] -= 1
        likelihood += probability
        slope += probability * order_slope
    return -np.log(likelihood), slope / likelihood


def test_equals_the_product_of_draws():
    expected = -np.log(np.exp(1) / (np.exp(1) + np.exp(2) + np.exp(-1))) - np.log(np.exp(2) / (np.exp(2) + np.exp(-1)))
    np.testing.assert_allclose(plackett_luce_loss(jnp.array([1.0, 2.0, -1.0])), expected, rtol=1e-6)


def test_gradient_is_the_chance_to_be_drawn_minus_being_drawn():
    rewards = np.array([1.0, 2.0, -1.0], np.float32)
    expected = softmax(rewards) - [1, 0, 0] + np.concatenate([[0], softmax(rewards[1:]) - [1, 0]])
    np.testing.assert_allclose(jax.grad(plackett_luce_loss)(rewards), expected, rtol=1e-5)


@pytest.mark.parametrize("candidates", [1, 2, 3, 5])
def test_probabilities_of_all_orders_sum_to_one(candidates):
    rewards = 3 * np.random.default_rng(candidates).standard_normal(candidates).astype(np.float32)
    orders = np.array(list(itertools.permutations(rewards)))  # [candidates!, candidates]
    np.testing.assert_allclose(np.exp(-compiled_loss(orders)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("candidates", [1, 2, 3, 7])
def test_equal_rewards_cost_the_log_of_the_number_of_orders(candidates):
    actual = compiled_loss(np.full((2, candidates), 5, np.float32))
    np.testing.assert_allclose(actual, np.full(2, math.log(math.factorial(candidates))), rtol=1e-6)


def test_two_candidates_are_bradley_terry():
    rewards = jnp.array([[2.0, 0.5], [-3.0, 3.0], [1e4, -1e4], [-1e4, 1e4]])
    np.testing.assert_array_equal(plackett_luce_loss(rewards), bradley_terry_loss(rewards))
    expected = jax.grad(lambda r: bradley_terry_loss(r).sum())(rewards)
    np.testing.assert_allclose(losses_and_gradient(rewards)[1], expected, rtol=1e-6)


def test_invariant_to_a_constant_added_to_all_rewards():
    rewards, ranks = jnp.array([[1.0, 2.0, -1.0], [0.0, -4.0, 3.0]]), jnp.array([[0, 0, 1], [1, 0, 1]])
    for options in ({}, {"ranks": ranks}):
        actual, _ = losses_and_gradient(rewards + 8, **options)
        np.testing.assert_allclose(actual, losses_and_gradient(rewards, **options)[0], rtol=1e-6)


@pytest.mark.parametrize("ranks", [None, [1, 0, UNRANKED, 1, 0]])
def test_masked_candidates_are_as_good_as_not_there_wherever_they_stand(ranks):
    rewards = np.random.default_rng(0).standard_normal(5).astype(np.float32)
    masks = np.array(list(itertools.product([False, True], repeat=5)))  # [32, 5]
    options = {} if ranks is None else {"ranks": np.where(masks, ranks, -3)}
    losses, gradient = losses_and_gradient(np.where(masks, rewards, np.nan), where=masks, **options)
    for row, mask in enumerate(masks):
        observed = np.arange(5) if ranks is None else np.array(ranks)
        expected, slope = by_enumeration(rewards[mask], observed[mask]) if mask.any() else (0, [])
        np.testing.assert_allclose(losses[row], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gradient[row, mask], slope, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(gradient[row, ~mask], 0)


def test_a_lone_candidate_is_silent_even_where_it_is_not_finite():
    rewards, exists = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0]]), jnp.array([[True, False], [True, False]])
    losses, gradient = losses_and_gradient(rewards, where=exists)
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


def test_extreme_rewards_have_finite_exact_loss_and_gradient():
    rewards = jnp.array([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [1e4, 1e4, 1e4], [-1e4, 0.0, 0.0]])
    losses, gradient = losses_and_gradient(rewards)
    np.testing.assert_allclose(losses, [0, 2e4 + 1e4, np.log(6), 1e4 + 2 * np.log(2)], rtol=1e-6)
    tied = np.array([1 / 3 - 1, 1 / 3 + 1 / 2 - 1, 1 / 3 + 1 / 2])
    expected = [[0, 0, 0], [-1, -1, 2], tied, [-1, 1 / 2 - 1 / 2, 1 / 2 + 1 / 2]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [1, 30])
def test_partial_ranking_is_the_sum_over_the_orders_that_agree(scale):
    rewards = scale * np.random.default_rng(1).standard_normal(PARTIAL.shape).astype(np.float32)
    expected, slope = map(np.array, zip(*map(by_enumeration, rewards.astype(np.float64), PARTIAL), strict=True))
    losses, gradient = losses_and_gradient(rewards, ranks=PARTIAL)
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        losses, gradient = losses_and_gradient(rewards.astype(np.float64), ranks=PARTIAL)
    np.testing.assert_allclose(losses, expected, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(gradient, slope, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("top", [1, 2])
def test_probabilities_of_all_top_k_sum_to_one(top):
    rewards = 3 * np.random.default_rng(2).standard_normal(5).astype(np.float32)
    observed = np.array(list(itertools.permutations(range(5), top)))  # [observations, top]
    ranks = np.full((len(observed), 5), UNRANKED)
    np.put_along_axis(ranks, observed, np.arange(top)[None], axis=1)
    losses, _ = losses_and_gradient(np.tile(rewards, (len(observed), 1)), ranks=ranks)
    np.testing.assert_allclose(jnp.exp(-losses).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize(("candidates", "best"), [(3, 2), (6, 3), (8, 7)])
def test_probabilities_of_all_sets_of_the_best_sum_to_one(candidates, best):
    rewards = 3 * np.random.default_rng(candidates).standard_normal(candidates).astype(np.float32)
    sets = np.array(list(itertools.combinations(range(candidates), best)))  # [sets, best]
    ranks = np.ones((len(sets), candidates), np.int32)
    np.put_along_axis(ranks, sets, 0, axis=1)
    losses, _ = losses_and_gradient(np.tile(rewards, (len(sets), 1)), ranks=ranks)
    np.testing.assert_allclose(jnp.exp(-losses).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("candidates", "best"), [(12, 11), (64, 32), (200, 199)])
def test_sets_of_equal_rewards_are_equally_likely_for_any_number_of_candidates(candidates, best, dtype):
    with jax.enable_x64(True):
        ranks = np.where(np.arange(candidates) < best, 0, UNRANKED)
        losses, gradient = losses_and_gradient(np.full((1, candidates), 7, dtype), ranks=ranks[None])
    rtol = 1e-6 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(losses, [math.log(math.comb(candidates, best))], rtol=rtol)
    np.testing.assert_allclose(np.asarray(gradient).sum(), 0, atol=10 * rtol)


def test_two_tied_candidates_cost_nothing():
    rewards, ranks = jnp.array([[2.0, -1.0], [-1e4, 1e4]]), jnp.array([[0, 0], [UNRANKED, UNRANKED]])
    losses, gradient = losses_and_gradient(rewards, ranks=ranks)
    np.testing.assert_array_equal(losses, 0)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


def test_ranks_without_ties_are_the_order_as_it_stands():
    rewards = np.random.default_rng(4).standard_normal((6, 5)).astype(np.float32)
    ranks = np.random.default_rng(5).permuted(np.tile(np.arange(5), (6, 1)), axis=1)
    best_first = np.take_along_axis(rewards, np.argsort(ranks), axis=1)
    actual = compiled_loss(rewards, ranks=ranks)
    np.testing.assert_allclose(actual, compiled_loss(best_first), rtol=1e-6)


def test_extreme_rewards_of_tied_candidates_have_finite_exact_loss_and_gradient():
    rewards = jnp.array([[1e4, 1e4, -1e4], [-1e4, -1e4, 1e4], [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4, 1e4]])
    losses, gradient = losses_and_gradient(rewards, ranks=np.tile([0, 0, 1], (5, 1)))
    # The first two must be drawn before the third. Second row: two orders of e^-2e4 e^-2e4. Third: e^-1e4 to draw the
    # second of them. Fourth: e^-2e4 to draw the first, at once (1/2 for the draw after it) or after the second (1/2).
    expected = [0, 4e4 - np.log(2), 1e4, 2e4 - np.log(1 / 2 * 1 / 2 + 1 / 2), np.log(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-6, atol=1e-6)
    three = [1 / 3 + (1 / 2 - 2) / 2] * 2  # of three equals, first or second
    slopes = [[0, 0, 0], [-1, -1, 2], [0, -1, 1], [-1, 2 / 3 * -1 / 2, 1 / 3 + 2 / 3 * 3 / 2], [*three, 1 / 3 + 1 / 2]]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [np.zeros((1, 3), np.int32), np.zeros(2, np.int32), np.zeros((1, 2), np.float32)])
def test_ranks_of_wrong_shape_or_dtype(ranks):
    with pytest.raises(InputError, match=r"ranks is \w+ of shape .*; allowed: integers of the shape .*, \(1, 2\)"):
        plackett_luce_loss(np.zeros((1, 2), np.float32), ranks=ranks)


def test_dpo_on_rankings_is_plackett_luce_on_implicit_rewards():
    policy, ref = -50 * np.random.default_rng(1).random((2, 4, 3), np.float32)
    exists = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 1]], bool)
    actual = plackett_luce_dpo_loss(policy, ref, beta=0.2, where=exists)
    expected = plackett_luce_loss(implicit_rewards(policy, ref, beta=0.2), where=exists)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_array_equal(actual[1], dpo_loss(policy[1, :2], ref[1, :2], beta=0.2))
    np.testing.assert_array_equal(actual[2], dpo_loss(policy[2, 1:], ref[2, 1:], beta=0.2))
    assert actual[3] == 0


@pytest.mark.parametrize("ranks", [[0, 1], [0, UNRANKED]])
def test_dpo_on_two_ranked_candidates_is_dpo_whichever_stands_first(ranks):
    policy, ref = -50 * np.random.default_rng(3).random((2, 3, 2), np.float32)
    forth, back = np.tile(ranks, (3, 1)), np.tile(ranks[::-1], (3, 1))
    expected, loss = dpo_loss(policy, ref, beta=0.2), jax.jit(plackett_luce_dpo_loss)
    np.testing.assert_allclose(loss(policy, ref, beta=0.2, ranks=forth), expected, rtol=1e-6)
    swapped = loss(policy[:, ::-1], ref[:, ::-1], beta=0.2, ranks=back)
    np.testing.assert_allclose(swapped, expected, rtol=1e-6)


def test_dpo_on_rankings_without_reference_ranks_by_log_probability():
    policy = jnp.array([-3.0, -5.0, -4.0])
    np.testing.assert_array_equal(plackett_luce_dpo_loss(policy, None, beta=0.5), plackett_luce_loss(0.5 * policy))


def test_dpo_on_rankings_is_dpo_for_any_divergence():
    policy, ref = -20 * np.random.default_rng(7).random((2, 3, 2), np.float32)
    for divergence in DIVERGENCES.values():
        expected = dpo_loss(policy, ref, divergence=divergence)
        np.testing.assert_array_equal(plackett_luce_dpo_loss(policy, ref, divergence=divergence), expected)


def test_dpo_on_partial_rankings_in_float32_is_float64_on_the_same_log_probabilities():
    policy, ref = -2000 * np.random.default_rng(8).random((2, 50, 4), np.float32)
    ranks = np.random.default_rng(9).integers(0, 3, (50, 4))
    loss = jax.jit(plackett_luce_dpo_loss)
    narrow = loss(policy, ref, beta=0.1, ranks=ranks)
    with jax.enable_x64(True):
        wide = np.asarray(loss(policy.astype(np.float64), ref.astype(np.float64), beta=0.1, ranks=ranks))
    np.testing.assert_allclose(narrow, wide, rtol=1e-6, atol=1e-6)
