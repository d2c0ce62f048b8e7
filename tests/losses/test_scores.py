"""Differences that keep float32 exact: two-sums, quotients, and margins built of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.losses._scores import (
    Wide,
    candidate_scores,
    difference,
    half_inverse,
    pair_logits,
    per_token,
    subtract,
    subtract_best,
)
from jaxdpo.losses.divergences import alpha_divergence, forward_kl, reverse_kl

ROUNDING = 2.0**-23
"""Relative: what is rounded twice in float32."""


@pytest.fixture
def logps():
    return -2000 * np.random.default_rng(0).random((2, 4000, 2), np.float32)


def wide(x):
    return np.asarray(x.value, np.float64) + np.asarray(x.rest, np.float64)


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_difference_loses_nothing(logps, transform):
    a, b = logps
    actual = transform(difference)(a, b)
    np.testing.assert_array_equal(wide(actual), a.astype(np.float64) - b)
    assert np.abs(actual.rest).max() > 2.0**-15  # it would have been lost
    np.testing.assert_array_equal(actual.value, a - b)


def test_the_gradient_of_a_difference_is_one():
    gradients = jax.grad(lambda a, b: sum(difference(a, b)), argnums=(0, 1))(-1999.9, -0.1)
    np.testing.assert_array_equal(gradients, [1, -1])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_difference_of_means_per_token_is_rounded_once(logps, transform):
    lengths = np.random.default_rng(1).integers(1, 90, logps[0].shape).astype(np.float32)

    @transform
    def margin(policy, ref):
        means = per_token(difference(policy, ref), lengths)  # the lengths are constants to XLA
        return subtract(*(Wide(means.value[:, i], means.rest[:, i]) for i in (0, 1)))

    expected = ((logps[0].astype(np.float64) - logps[1]) / lengths) @ [1, -1]
    np.testing.assert_allclose(margin(*logps), expected, rtol=ROUNDING, atol=2 * ROUNDING)


def test_the_gradient_of_a_mean_per_token_is_one_over_the_length():
    lengths = jnp.array([1.0, 3.0, 7.0, 0.0])
    gradient = jax.grad(lambda x: sum(per_token(Wide(x, jnp.zeros_like(x)), lengths)).sum())(
        jnp.array([5.0, -8.0, -1e4, 0])
    )
    np.testing.assert_allclose(gradient, [1, 1 / 3, 1 / 7, 1], rtol=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.01, 0.001, 3.0])
def test_one_over_twice_beta_has_more_digits_than_float32(beta):
    np.testing.assert_allclose(wide(half_inverse(beta, jnp.dtype("float32"))), 0.5 / beta, rtol=1e-14)
    traced = jax.jit(lambda b: half_inverse(b, jnp.dtype("float32")))(beta)
    np.testing.assert_allclose(wide(traced), 0.5 / beta, rtol=2 * ROUNDING)


@pytest.mark.parametrize("beta", [0.1, 0.01, 5.0])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_logits_are_rounded_once_however_large_the_log_probabilities(logps, beta, transform):
    logits, counts = transform(
        lambda policy, ref: pair_logits(policy, ref, beta=beta, divergence=reverse_kl, where=None)
    )(*logps)
    expected = beta * (logps[0].astype(np.float64) - logps[1]) @ [1, -1]
    np.testing.assert_allclose(logits, expected, rtol=3 * ROUNDING)
    assert counts.all()


@pytest.mark.parametrize("divergence", [forward_kl, functools.partial(alpha_divergence, alpha=0.5)], ids=["f", "alpha"])
def test_a_score_knows_what_rounding_lost(divergence):
    policy, ref = -np.random.default_rng(2).random((2, 500, 2), np.float32)
    policy, ref = 15 * policy - 49, 1e-3 * ref  # log-ratios of -49 to -64, off by up to 2e-6 in float32
    with jax.enable_x64(True):
        expected = np.asarray(divergence(jnp.asarray(policy.astype(np.float64) - ref)))
    scores, _ = candidate_scores(policy, ref, divergence, None)
    np.testing.assert_allclose(wide(scores), expected, rtol=4e-7)


def test_the_best_score_of_a_group_is_zero_and_others_are_below():
    scores = Wide(jnp.array([[1.0, 4.0, 9.0], [3.0, 3.0, -5.0], [7.0, 8.0, 9.0]]), jnp.zeros((3, 3)))
    exists = jnp.array([[True, True, False], [True, True, True], [False, False, False]])
    np.testing.assert_array_equal(subtract_best(scores, exists), [[-3, 0, 0], [0, 0, -8], [0, 0, 0]])
