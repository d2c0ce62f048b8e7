"""Losses that pin each reward: formulas, what tells them from DPO, ragged NCA, extremes, masks, messages."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses.pointwise import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_loss, sppo_hard_loss
from jaxdpo.types import InputError

soft_plus = functools.partial(np.logaddexp, 0)


def sigmoid(x):
    return np.exp(-soft_plus(-x))


FORMULAS = {
    nca_loss: lambda good, bad, beta: soft_plus(-beta * good) + (soft_plus(beta * good) + soft_plus(beta * bad)) / 2,
    bco_pair_loss: lambda good, bad, beta: soft_plus(-beta * good) + soft_plus(beta * bad),
    sppo_hard_loss: lambda good, bad, beta: (good - 1 / (2 * beta)) ** 2 + (bad + 1 / (2 * beta)) ** 2,
    apo_zero_loss: lambda good, bad, beta: 1 - sigmoid(beta * good) + sigmoid(beta * bad),
    apo_down_loss: lambda good, bad, beta: sigmoid(beta * good) + 1 - sigmoid(beta * (good - bad)),
}
"""Of the log-ratios of chosen and rejected."""
every_loss = pytest.mark.parametrize("loss", FORMULAS)


def grad_of_sum(loss, **options):
    return jax.jit(jax.grad(lambda policy, ref: loss(policy, ref, **options).sum(), argnums=(0, 1)))


@every_loss
def test_equals_the_formula_in_float64(loss):
    policy, ref = -60 * np.random.default_rng(0).random((2, 40, 2))
    with jax.enable_x64(True):
        for beta in (0.001, 0.01, 0.1, 0.7):
            expected = FORMULAS[loss](*(policy - ref).T, beta)
            np.testing.assert_allclose(loss(policy, ref, beta=beta), expected, rtol=1e-10, atol=1e-14)


@every_loss
def test_equals_the_formula_in_float32(loss):
    policy, ref = -2000 * np.random.default_rng(0).random((2, 4000, 2), np.float32)
    for beta in (0.001, 0.1):
        expected = FORMULAS[loss](*(policy.astype(np.float64) - ref).T, beta)
        np.testing.assert_allclose(loss(policy, ref, beta=beta), expected, rtol=2e-6, atol=1e-6)


@every_loss
def test_a_shift_of_both_rewards_matters(loss):
    ref = jnp.array([[-40.0, -42.0]])
    policy = ref + jnp.array([[10.0, -10.0]])
    assert abs(loss(policy + 5, ref) - loss(policy, ref)) > 0.01


@every_loss
def test_reference_free_is_a_reference_that_is_zero(loss):
    policy = jnp.array([[-3.0, -5.0]])
    np.testing.assert_array_equal(loss(policy, None), loss(policy, jnp.zeros_like(policy)))


@every_loss
def test_extreme_log_probabilities_are_finite(loss):
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=4)))  # [16, 4]
    policy, ref = (1e4 * signs).reshape(2, 16, 2)
    for beta in (0.001, 0.1):
        assert np.isfinite(loss(policy, ref, beta=beta)).all()
        assert np.isfinite(grad_of_sum(loss, beta=beta)(policy, ref)).all()


@every_loss
def test_incomplete_pairs_are_silent_whatever_they_hold(loss):
    policy = jnp.array([[-3.0, -5.0], [-3.0, jnp.nan], [jnp.inf, -5.0], [jnp.nan, jnp.nan]])
    exists = jnp.array([[True, True], [True, False], [False, True], [False, False]])
    losses = loss(policy, policy + 1, where=exists)
    np.testing.assert_array_equal(losses, [loss(policy[0], policy[0] + 1), 0, 0, 0])
    for gradient in grad_of_sum(loss, where=exists)(policy, policy + 1):
        assert np.isfinite(gradient[0]).all()
        np.testing.assert_array_equal(gradient[1:], 0)


@pytest.mark.parametrize("loss", [loss for loss in FORMULAS if loss is not nca_loss])
def test_three_candidates_are_refused(loss):
    with pytest.raises(InputError, match=r"3 candidates .* allowed: 2, chosen then rejected"):
        loss(jnp.zeros(3), None)


def test_sppo_is_zero_at_its_targets():
    ref = jnp.array([-12.0, -15.0])
    np.testing.assert_allclose(sppo_hard_loss(ref + jnp.array([50, -50]), ref, beta=0.01), 0, atol=1e-6)


def test_sppo_near_its_targets_in_float32():
    noise = np.random.default_rng(4).standard_normal((2, 200, 2))
    ref = (-1500 + 9 * noise[0]).astype(np.float32)
    policy = (ref + [500, -500] + noise[1]).astype(np.float32)
    deviation = policy.astype(np.float64) - ref - [500, -500]
    np.testing.assert_allclose(sppo_hard_loss(policy, ref, beta=0.001), (deviation**2).sum(axis=-1), rtol=1e-6)


@pytest.mark.parametrize(("loss", "signs"), [(apo_zero_loss, [-1, 1]), (apo_down_loss, [1, 1])])
def test_apo_moves_the_chosen_completion_as_named(loss, signs):
    gradient, _ = grad_of_sum(loss)(jnp.array([-10.0, -70.0]), jnp.array([-12.0, -15.0]))
    np.testing.assert_array_equal(np.sign(gradient), signs)


@pytest.mark.parametrize("given", [False, True])
def test_nca_of_a_ranking_equals_the_sum_over_its_candidates(given):
    policy, ref = -60 * np.random.default_rng(1).random((2, 5, 4))
    targets = np.random.default_rng(2).dirichlet(np.ones(4), 5) if given else np.eye(4)[[0, 0, 0, 0, 0]]
    rewards = 0.2 * (policy - ref)
    expected = (targets * soft_plus(-rewards) + soft_plus(rewards) / 4).sum(axis=-1)
    with jax.enable_x64(True):
        actual = nca_loss(policy, ref, beta=0.2, targets=targets if given else None)
    np.testing.assert_allclose(actual, expected, rtol=1e-10)


def test_nca_counts_the_candidates_that_exist():
    policy, ref = -60 * np.random.default_rng(3).random((2, 4), np.float32)
    targets = np.array([0.1, 0.4, 0.2, 0.3], np.float32)
    for mask in itertools.product([False, True], repeat=4):
        exists = np.array(mask)
        padded = np.where(exists, policy, np.nan), np.where(exists, ref, np.inf)
        for given in (None, targets):
            masked = nca_loss(*padded, targets=None if given is None else np.where(exists, given, np.nan), where=exists)
            if exists.sum() < 2:
                assert masked == 0
            else:
                short = nca_loss(policy[exists], ref[exists], targets=None if given is None else given[exists])
                np.testing.assert_allclose(masked, short, rtol=1e-6)
    gradient, _ = grad_of_sum(nca_loss, where=exists & [True, True, False, True])(*padded)
    assert gradient[2] == 0 and np.isfinite(gradient).all()


def test_targets_are_one_per_candidate():
    with pytest.raises(InputError, match=r"targets has shape \(2,\), policy_logps has \(3,\); allowed: equal"):
        nca_loss(jnp.zeros(3), None, targets=jnp.ones(2))
