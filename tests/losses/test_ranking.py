"""Plackett-Luce: formulas, probabilities over all orders, Bradley-Terry as its case of two, ragged rankings."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses import bradley_terry_loss, dpo_loss, implicit_rewards, plackett_luce_dpo_loss, plackett_luce_loss


def test_equals_the_product_of_draws():
    expected = -np.log(np.exp(1) / (np.exp(1) + np.exp(2) + np.exp(-1))) - np.log(np.exp(2) / (np.exp(2) + np.exp(-1)))
    np.testing.assert_allclose(plackett_luce_loss(jnp.array([1.0, 2.0, -1.0])), expected, rtol=1e-6)


def test_gradient_is_the_chance_to_be_drawn_minus_being_drawn():
    def softmax(r):
        return np.exp(r) / np.exp(r).sum()

    rewards = np.array([1.0, 2.0, -1.0], np.float32)
    expected = softmax(rewards) - [1, 0, 0] + np.concatenate([[0], softmax(rewards[1:]) - [1, 0]])
    np.testing.assert_allclose(jax.grad(plackett_luce_loss)(rewards), expected, rtol=1e-5)


@pytest.mark.parametrize("candidates", [1, 2, 3, 5])
def test_probabilities_of_all_orders_sum_to_one(candidates):
    rewards = 3 * np.random.default_rng(candidates).standard_normal(candidates).astype(np.float32)
    orders = np.array(list(itertools.permutations(rewards)))  # [candidates!, candidates]
    np.testing.assert_allclose(jnp.exp(-plackett_luce_loss(orders)).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("candidates", [1, 2, 3, 7])
def test_equal_rewards_cost_the_log_of_the_number_of_orders(candidates):
    actual = plackett_luce_loss(jnp.full((2, candidates), 5.0))
    np.testing.assert_allclose(actual, np.full(2, math.log(math.factorial(candidates))), rtol=1e-6)


def test_two_candidates_are_bradley_terry():
    rewards = jnp.array([[2.0, 0.5], [-3.0, 3.0], [1e4, -1e4], [-1e4, 1e4]])
    np.testing.assert_array_equal(plackett_luce_loss(rewards), bradley_terry_loss(rewards))
    gradients = [jax.grad(lambda r, f=f: f(r).sum())(rewards) for f in (plackett_luce_loss, bradley_terry_loss)]
    np.testing.assert_array_equal(*gradients)


def test_invariant_to_a_constant_added_to_all_rewards():
    rewards = jnp.array([[1.0, 2.0, -1.0], [0.0, -4.0, 3.0]])
    np.testing.assert_allclose(plackett_luce_loss(rewards + 8), plackett_luce_loss(rewards), rtol=1e-6)


def test_masked_candidates_are_as_good_as_not_there_wherever_they_stand():
    rewards = np.random.default_rng(0).standard_normal(5).astype(np.float32)

    for exists in itertools.product([False, True], repeat=5):
        mask = np.array(exists)
        masked = np.where(mask, rewards, np.nan)
        value, gradient = jax.value_and_grad(lambda r, mask=mask: plackett_luce_loss(r, where=mask))(masked)
        if mask.sum() < 2:
            expected, slope = 0, np.zeros(mask.sum())
        else:
            expected, slope = jax.value_and_grad(plackett_luce_loss)(rewards[mask])
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        np.testing.assert_allclose(gradient[mask], slope, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(gradient[~mask], 0)


def test_a_lone_candidate_is_silent_even_where_it_is_not_finite():
    rewards, exists = jnp.array([[jnp.nan, 1.0], [jnp.inf, 1.0]]), jnp.array([[True, False], [True, False]])
    value, gradient = jax.value_and_grad(lambda r: plackett_luce_loss(r, where=exists).sum())(rewards)
    np.testing.assert_array_equal(value, 0)
    np.testing.assert_array_equal(gradient, np.zeros((2, 2)))


def test_extreme_rewards_have_finite_exact_loss_and_gradient():
    rewards = jnp.array([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [1e4, 1e4, 1e4], [-1e4, 0.0, 0.0]])
    values, pullback = jax.vjp(plackett_luce_loss, rewards)
    np.testing.assert_allclose(values, [0, 2e4 + 1e4, np.log(6), 1e4 + 2 * np.log(2)], rtol=1e-6)
    tied = np.array([1 / 3 - 1, 1 / 3 + 1 / 2 - 1, 1 / 3 + 1 / 2])
    expected = [[0, 0, 0], [-1, -1, 2], tied, [-1, 1 / 2 - 1 / 2, 1 / 2 + 1 / 2]]
    np.testing.assert_allclose(pullback(jnp.ones(4))[0], expected, rtol=1e-6, atol=1e-7)


def test_dpo_on_rankings_is_plackett_luce_on_implicit_rewards():
    policy, ref = -50 * np.random.default_rng(1).random((2, 4, 3), np.float32)
    exists = np.array([[1, 1, 1], [1, 1, 0], [0, 1, 1], [0, 0, 1]], bool)
    actual = plackett_luce_dpo_loss(policy, ref, beta=0.2, where=exists)
    np.testing.assert_array_equal(actual, plackett_luce_loss(implicit_rewards(policy, ref, beta=0.2), where=exists))
    np.testing.assert_array_equal(actual[1], dpo_loss(policy[1, :2], ref[1, :2], beta=0.2))
    np.testing.assert_array_equal(actual[2], dpo_loss(policy[2, 1:], ref[2, 1:], beta=0.2))
    assert actual[3] == 0


def test_dpo_on_rankings_without_reference_ranks_by_log_probability():
    policy = jnp.array([-3.0, -5.0, -4.0])
    np.testing.assert_array_equal(plackett_luce_dpo_loss(policy, None, beta=0.5), plackett_luce_loss(0.5 * policy))
