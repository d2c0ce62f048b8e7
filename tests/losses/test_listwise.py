"""EXO: the divergence between two choices, its pair form, targets, ragged groups, extremes, messages."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses.divergences import DIVERGENCES
from jaxdpo.losses.listwise import exo_loss
from jaxdpo.types import InputError


def softmax(x):
    return np.exp(x - np.logaddexp.reduce(x, axis=-1, keepdims=True))


def reverse_kl_to(targets, scores):
    p = softmax(scores)
    return (p * (np.log(p) - np.log(targets))).sum(axis=-1)


def smoothed(candidates, epsilon):
    return np.array([1 - epsilon] + [epsilon / (candidates - 1)] * (candidates - 1))


@pytest.mark.parametrize("candidates", [2, 4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_divergence_from_the_target_in_float64(candidates, name):
    policy, ref = -6 * np.random.default_rng(0).random((2, 20, candidates))
    given = np.random.default_rng(1).dirichlet(np.ones(candidates), 20)
    with jax.enable_x64(True):
        scores = 0.3 * np.asarray(DIVERGENCES[name](policy - ref))
        run = functools.partial(exo_loss, policy, ref, beta=0.3, divergence=DIVERGENCES[name])
        np.testing.assert_allclose(run(targets=given), reverse_kl_to(given, scores), rtol=1e-10, atol=1e-14)
        for epsilon in (1e-6, 0.001, 0.4):
            expected = reverse_kl_to(smoothed(candidates, epsilon), scores)
            np.testing.assert_allclose(run(label_smoothing=epsilon), expected, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(run(), run(label_smoothing=0.001))


def test_the_pair_form_in_float32():
    policy, ref = -2000 * np.random.default_rng(2).random((2, 4000, 2), np.float32)
    m = 0.1 * (policy.astype(np.float64) - ref) @ [1, -1]
    log_chosen, log_rejected = -np.logaddexp(0, -m), -np.logaddexp(0, m)
    expected = np.exp(log_chosen) * (log_chosen - np.log1p(-0.01)) + np.exp(log_rejected) * (
        log_rejected - np.log(0.01)
    )
    np.testing.assert_allclose(exo_loss(policy, ref, label_smoothing=0.01), expected, rtol=2e-6, atol=2e-6)


def test_least_and_flat_where_the_policy_chooses_as_the_target():
    targets = jnp.array([0.5, 0.3, 0.15, 0.05])
    run = jax.jit(jax.value_and_grad(lambda p: exo_loss(p, None, beta=0.5, targets=targets)))
    value, gradient = run(jnp.log(targets) / 0.5)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, np.zeros(4), atol=1e-7)


def test_gradient_is_that_of_the_divergence_though_the_best_score_is_held():
    scores, targets = np.array([0.3, 1.2, -0.4]), np.array([0.6, 0.3, 0.1])
    p = softmax(scores)
    excess = np.log(p / targets)
    expected = p * (excess - (p * excess).sum())
    gradient = jax.jit(jax.grad(lambda s: exo_loss(s, None, beta=1.0, targets=targets)))(jnp.asarray(scores))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-7)


def test_targets_of_zero_are_counted_as_e_to_the_minus_80():
    loss = exo_loss(jnp.zeros(2), None, targets=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(loss, np.log(0.5) + 80 / 2, rtol=1e-6)


def test_masked_candidates_are_as_good_as_not_there_wherever_they_stand():
    policy, ref = -60 * np.random.default_rng(3).random((2, 4), np.float32)
    targets = np.array([0.1, 0.4, 0.2, 0.3], np.float32)
    run = jax.jit(jax.value_and_grad(lambda p, r, where, **targets: exo_loss(p, r, where=where, **targets)))
    for mask in itertools.product([False, True], repeat=4):
        exists = np.array(mask)
        padded = np.where(exists, policy, np.nan), np.where(exists, ref, np.inf)
        for given in ({}, {"targets": targets}):
            value, gradient = run(*padded, exists, **{name: np.where(exists, q, np.nan) for name, q in given.items()})
            np.testing.assert_array_equal(gradient[~exists], 0)
            if exists.sum() < 2:
                np.testing.assert_array_equal(gradient, np.zeros(4))
                assert value == 0
            else:
                short = exo_loss(policy[exists], ref[exists], **{name: q[exists] for name, q in given.items()})
                np.testing.assert_allclose(value, short, rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_extreme_log_probabilities_are_finite(name):
    signs = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))  # [8, 3]
    policy = jnp.concatenate([150 * signs, 1e4 * signs])
    for targets in (None, jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0]), policy.shape)):
        run = functools.partial(exo_loss, targets=targets, divergence=DIVERGENCES[name])
        values, pullback = jax.vjp(run, policy, -policy[::-1])
        assert np.isfinite(values).all()
        assert np.isfinite(pullback(jnp.ones(16))).all()


@pytest.mark.parametrize("label_smoothing", [0, 0.5, -0.1, float("nan")])
def test_label_smoothing_out_of_range(label_smoothing):
    with pytest.raises(InputError, match=r"label_smoothing=\S+ is out of range; allowed: above 0 to below 0.5"):
        exo_loss(jnp.zeros(2), None, label_smoothing=label_smoothing)


def test_targets_are_one_per_candidate():
    with pytest.raises(InputError, match=r"targets has shape \(2,\), policy_logps has \(3,\); allowed: equal"):
        exo_loss(jnp.zeros(3), None, targets=jnp.ones(2))
