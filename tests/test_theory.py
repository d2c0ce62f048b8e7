"""The paper's theory: worked examples, optimality, from rewards to policies and back, games in circles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from jaxdpo.losses import dpo_loss, implicit_rewards
from jaxdpo.theory import (
    dpo_gradient,
    dpo_gradient_weight,
    equivalent_rewards,
    kl_constrained_objective,
    log_partition_function,
    optimal_policy,
    project_reward,
    reward_of_policy,
    von_neumann_winner,
)
from jaxdpo.types import InputError

BETA = 0.3
RTOL = 1e-5
"""Rewards of up to 3 over a beta of 0.3 round by 1e-6."""
WINNER = jax.jit(von_neumann_winner)


@pytest.fixture
def problem():
    """Normalized reference log-probabilities and rewards of four prompts with five responses."""
    logits, rewards = np.random.default_rng(0).standard_normal((2, 4, 5)).astype(np.float32)
    return normalized(logits), rewards


def normalized(logits):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(logits), axis=-1))


def test_worked_example_of_a_pair():
    policy, ref = np.log([0.3, 0.7]), np.log([0.4, 0.6])  # y_w first
    odds = (0.3 / 0.4) / (0.7 / 0.6)
    np.testing.assert_allclose(dpo_loss(policy, ref, beta=1.0), -np.log(odds / (1 + odds)), rtol=RTOL)
    np.testing.assert_allclose(dpo_loss(policy, ref, beta=1.0), 0.938, atol=5e-4)
    np.testing.assert_allclose(dpo_gradient_weight(policy, ref, beta=1.0), 1 / (1 + odds), rtol=RTOL)
    np.testing.assert_allclose(dpo_gradient_weight(policy, ref, beta=1.0), 1 - 0.391, atol=5e-4)


def test_worked_example_of_a_reward():
    rewards, ref = np.log([2.0, 1.0]), np.log([0.5, 0.5])
    np.testing.assert_allclose(np.exp(optimal_policy(ref, rewards, beta=1.0)), [2 / 3, 1 / 3], rtol=RTOL)
    np.testing.assert_allclose(log_partition_function(ref, rewards, beta=1.0), np.log(1.5), rtol=RTOL)
    np.testing.assert_allclose(project_reward(rewards, ref, beta=1.0) - rewards, [-np.log(1.5)] * 2, rtol=RTOL)


def test_the_optimal_policy_beats_all_others(problem):
    ref, rewards = problem
    best = optimal_policy(ref, rewards, beta=BETA)
    np.testing.assert_allclose(jnp.exp(best).sum(axis=-1), np.ones(4), rtol=RTOL)
    value = kl_constrained_objective(best, ref, rewards, beta=BETA)
    np.testing.assert_allclose(value, BETA * log_partition_function(ref, rewards, beta=BETA), rtol=RTOL)
    rng = np.random.default_rng(1)
    for scale in (0.1, 1, 5):
        others = normalized(best[None] + scale * rng.standard_normal((100, 4, 5)).astype(np.float32))
        tiled = [np.tile(x, (100, 1, 1)) for x in (ref, rewards)]
        lost = value[None] - kl_constrained_objective(others, *tiled, beta=BETA)
        divergence = (np.exp(others) * (others - best[None])).sum(
            axis=-1
        )  # KL(other || best), what the others lose over beta
        assert (divergence > 0).all()
        np.testing.assert_allclose(lost, BETA * divergence, rtol=1e-3, atol=1e-6)


def test_objective_is_reward_less_divergence_and_skips_what_cannot_happen():
    policy, ref, rewards = np.log([0.25, 0.75, 1]), np.log([0.5, 0.25, 0.25]), np.array([1.0, 2.0, 3.0])
    policy[2] = -np.inf
    expected = 0.25 * 1 + 0.75 * 2 - BETA * (0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.25))
    value, gradient = jax.value_and_grad(kl_constrained_objective)(policy, ref, rewards, beta=BETA)
    np.testing.assert_allclose(value, expected, rtol=RTOL)
    assert np.isfinite(gradient).all()


def test_from_a_policy_to_its_reward_and_back(problem):
    ref, logits = problem
    policy, log_z = normalized(logits), np.array([0.0, -1.0, 2.0, 0.5], np.float32)
    for log_partition in (0.0, log_z):
        rewards = reward_of_policy(policy, ref, beta=BETA, log_partition=log_partition)
        np.testing.assert_allclose(optimal_policy(ref, rewards, beta=BETA), policy, rtol=RTOL, atol=RTOL)
        actual = log_partition_function(ref, rewards, beta=BETA)
        np.testing.assert_allclose(actual, np.broadcast_to(log_partition, 4), rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(reward_of_policy(policy, ref, beta=BETA), implicit_rewards(policy, ref, beta=BETA))


def test_from_a_reward_to_its_policy_and_back_is_the_projection(problem):
    ref, rewards = problem
    projected = project_reward(rewards, ref, beta=BETA)
    back = reward_of_policy(optimal_policy(ref, rewards, beta=BETA), ref, beta=BETA)
    np.testing.assert_allclose(back, projected, rtol=RTOL, atol=RTOL)


def test_projection_picks_one_reward_of_each_class(problem):
    ref, rewards = problem
    shifted = rewards + np.array([[3.0], [-2.0], [0.5], [10.0]], np.float32)
    projected = project_reward(rewards, ref, beta=BETA)
    assert equivalent_rewards(projected, rewards).all()
    np.testing.assert_allclose(log_partition_function(ref, projected, beta=BETA), np.zeros(4), atol=RTOL)
    np.testing.assert_allclose(project_reward(projected, ref, beta=BETA), projected, rtol=RTOL, atol=RTOL)
    np.testing.assert_allclose(project_reward(shifted, ref, beta=BETA), projected, rtol=RTOL, atol=RTOL)


def test_rewards_are_equivalent_up_to_a_function_of_the_prompt():
    rewards = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [0.0, 0.0, 0.0]])
    others = np.array([[3.0, 4.0, 6.0], [3.0, 4.0, 7.0], [0.0, 0.5, 1.0]])
    np.testing.assert_array_equal(equivalent_rewards(rewards, others), [True, False, False])
    np.testing.assert_array_equal(equivalent_rewards(rewards, others, atol=0.5), [True, True, True])
    np.testing.assert_array_equal(equivalent_rewards(rewards, others, atol=0.4), [True, False, False])
    two = np.tile([True, True, False], (3, 1))
    np.testing.assert_array_equal(equivalent_rewards(rewards, others, where=two), [True, True, False])
    np.testing.assert_array_equal(equivalent_rewards(rewards, others, where=np.zeros((3, 3), bool)), [True] * 3)


@pytest.mark.parametrize("there", [[0, 2, 3], [4], []])
def test_absent_responses_are_as_good_as_not_there(problem, there):
    where = np.zeros((4, 5), bool)
    where[:, there] = True
    ref, rewards = (np.where(where, x, np.nan) for x in problem)
    short = [x[:, there] for x in (ref, rewards)]
    policy = optimal_policy(ref, rewards, beta=BETA, where=where)
    np.testing.assert_array_equal(np.asarray(policy)[~where], -np.inf)
    log_z = log_partition_function(ref, rewards, beta=BETA, where=where)
    projected = project_reward(rewards, ref, beta=BETA, where=where)
    value = kl_constrained_objective(policy, ref, rewards, beta=BETA, where=where)
    if there:
        np.testing.assert_allclose(policy[:, there], optimal_policy(*short, beta=BETA), rtol=RTOL, atol=RTOL)
        np.testing.assert_allclose(log_z, log_partition_function(*short, beta=BETA), rtol=RTOL)
        np.testing.assert_allclose(projected[:, there], project_reward(*short[::-1], beta=BETA), rtol=RTOL)
    else:
        np.testing.assert_array_equal(log_z, np.zeros(4))
    np.testing.assert_allclose(value, BETA * log_z, rtol=RTOL, atol=RTOL)
    back = reward_of_policy(policy, ref, beta=BETA, log_partition=log_z, where=where)
    np.testing.assert_allclose(back, np.where(where, rewards, 0), rtol=RTOL, atol=RTOL)
    gradient = jax.grad(lambda r: log_partition_function(ref, r, beta=BETA, where=where).sum())(rewards)
    np.testing.assert_allclose(gradient, np.exp(policy) / BETA, rtol=RTOL)  # the policy, whichever way


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_gradient_in_closed_form_is_that_of_the_loss(beta):
    policy, ref = -50 * np.random.default_rng(2).random((2, 3, 4, 2), np.float32)
    where = np.random.default_rng(3).random((3, 4, 2)) < 0.8
    assert not where.all() and where.all(axis=-1).any()
    expected = jax.grad(lambda p: dpo_loss(p, ref, beta=beta, where=where).sum())(policy)
    actual = dpo_gradient(policy, ref, beta=beta, where=where)
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=1e-7)
    weight = dpo_gradient_weight(policy, ref, beta=beta, where=where)
    np.testing.assert_allclose(actual, beta * np.stack([-weight, weight], axis=-1), rtol=RTOL)
    np.testing.assert_array_equal(weight[~where.all(axis=-1)], 0)


def preferences(n, kind, seed):
    """A random preference matrix `[n, n]` in float64."""
    rng = np.random.default_rng(seed)
    upper = {
        "any": lambda: rng.random((n, n)),
        "sure": lambda: rng.integers(0, 3, (n, n)) / 2,  # always, never or a tie
        "nearly tied": lambda: 0.5 + 0.01 * rng.standard_normal((n, n)),
        "transitive": lambda: 1 / (1 + np.exp(-3 * np.subtract.outer(*[rng.standard_normal(n)] * 2))),  # Bradley-Terry
    }[kind]()
    upper = np.triu(upper, 1)
    return upper + np.tril(1 - upper.T, -1) + np.eye(n) / 2


def by_linear_program(wins):
    """The value that a maximin mixture is sure of, and the mixture."""
    n = len(wins)
    sure_of = np.column_stack([-wins.T, np.ones(n)])  # value - p @ wins <= 0
    ones, bounds = np.array([[*np.ones(n), 0.0]]), [(0, None)] * n + [(None, None)]
    result = linprog([*np.zeros(n), -1], sure_of, np.zeros(n), ones, [1.0], bounds)
    return -result.fun, result.x[:n]


@pytest.mark.parametrize("kind", ["any", "sure", "nearly tied", "transitive"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_no_response_is_preferred_to_the_winner(kind, dtype, tolerance):
    with jax.enable_x64(dtype == np.float64):
        for n in (1, 2, 7, 20):
            wins = np.stack([preferences(n, kind, seed) for seed in range(6)])
            mixtures = WINNER(wins.astype(dtype))
            assert mixtures.dtype == dtype
            mixtures = np.asarray(mixtures, np.float64)
            assert (mixtures >= 0).all()
            np.testing.assert_allclose(mixtures.sum(axis=-1), np.ones(6), rtol=tolerance)
            assert (np.einsum("gi,gij->gj", mixtures, wins) >= 0.5 - tolerance).all()


def test_the_winner_is_the_solution_of_a_linear_program():
    with jax.enable_x64(True):
        games = np.stack([preferences(7, "any", seed) for seed in range(6)])  # like almost all, they have one winner
        for wins, winner in zip(games, np.asarray(WINNER(games)), strict=True):
            value, mixture = by_linear_program(wins)
            np.testing.assert_allclose(value, 0.5, rtol=1e-9)
            np.testing.assert_allclose(winner, mixture, atol=1e-9)


def test_a_circle_of_preferences_shares_the_win():
    a, b, c = 0.9, 0.6, 0.7  # the first beats the second, the second the third, the third the first
    wins = np.array([[0.5, a, 1 - c], [1 - a, 0.5, b], [c, 1 - b, 0.5]])
    shares = np.array([b - 0.5, c - 0.5, a - 0.5])  # each by how sure the duel is that it is not in
    np.testing.assert_allclose(von_neumann_winner(wins), shares / shares.sum(), atol=1e-5)


def test_a_response_that_beats_all_others_wins():
    rewards = np.array([0.3, 2.0, -1.0, 1.9])
    wins = 1 / (1 + np.exp(rewards[None] - rewards[:, None]))  # Bradley-Terry
    np.testing.assert_allclose(von_neumann_winner(wins), [0, 1, 0, 0], atol=1e-4)


def test_equal_responses_win_equally():
    np.testing.assert_allclose(von_neumann_winner(np.full((4, 4), 0.5)), [0.25] * 4, rtol=RTOL)
    rock, paper, scissors = [0.5, 0, 1, 1], [1, 0.5, 0, 0], [0, 1, 0.5, 0.5]
    mixture = von_neumann_winner(np.array([rock, paper, scissors, scissors]))  # scissors twice
    np.testing.assert_allclose(mixture, [1 / 3, 1 / 3, 1 / 6, 1 / 6], atol=1e-5)


def test_absent_responses_do_not_play():
    wins = np.stack([preferences(6, "any", seed) for seed in range(3)])
    where = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool)
    both = where[:, :, None] & where[:, None]
    mixtures = von_neumann_winner(np.where(both, wins, np.nan), where=where)
    there = [0, 2, 3, 5]
    np.testing.assert_allclose(mixtures[0, there], von_neumann_winner(wins[0][np.ix_(there, there)]), atol=1e-5)
    np.testing.assert_allclose(mixtures[1:], where[1:], rtol=RTOL)
    np.testing.assert_array_equal(np.asarray(mixtures)[~where], 0)


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        (np.full((2, 3), 0.5), r"preferences have shape \(2, 3\); allowed: \[..., responses, responses\]"),
        (np.array([0.5]), r"preferences have shape \(1,\); allowed"),
        (np.zeros((0, 0)), r"preferences have shape \(0, 0\); allowed"),
        (
            np.array([[0.5, 0.7], [0.5, 0.5]]),
            r"preferences go down to 0.5, two directions miss 1 by 0.2; allowed: 0, and",
        ),
        (np.array([[0.5, 1.5], [-0.5, 0.5]]), r"preferences go down to -0.5, .* allowed: 0, and"),
        (np.array([[0.0, 1.0], [0.0, 0.0]]), r"miss 1 by 1; .* 1/2 on the diagonal"),
        (np.array([[0.5, np.nan], [0.5, 0.5]]), r"preferences go down to nan"),
    ],
)
def test_matrices_that_are_no_preferences(wins, message):
    with pytest.raises(InputError, match=message):
        von_neumann_winner(wins)


def test_bad_input_is_explained():
    two, three = np.zeros(2), np.zeros(3)
    with pytest.raises(InputError, match=r"rewards has shape \(3,\), ref_logps has \(2,\)"):
        optimal_policy(two, three, beta=1.0)
    with pytest.raises(InputError, match=r"beta=0 is out of range; allowed: above 0"):
        log_partition_function(two, two, beta=0)
    with pytest.raises(InputError, match=r"log_partition has shape \(2,\); allowed: \(\) or \(\)"):
        reward_of_policy(two, two, beta=1.0, log_partition=two)
    with pytest.raises(InputError, match=r"3 candidates .* allowed: 2"):
        dpo_gradient(three, three, beta=1.0)
    with pytest.raises(InputError, match=r"second has shape \(3,\), first has \(2,\)"):
        equivalent_rewards(two, three)
