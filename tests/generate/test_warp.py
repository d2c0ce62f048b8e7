"""Filters against literal distributions, and draws against the softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxdpo.generate.warp import WARPS, choose, min_p, top_k, top_p

PROBS = np.array([[0.5, 0.15, 0.05, 0.3], [0.1, 0.2, 0.3, 0.4]], np.float32)


def kept(logits):
    return np.isfinite(logits).tolist()


@pytest.mark.parametrize(
    ("warp", "value", "expected"),
    [
        (top_k, 1, [[1, 0, 0, 0], [0, 0, 0, 1]]),
        (top_k, 3, [[1, 1, 0, 1], [0, 1, 1, 1]]),
        (top_k, 9, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (top_p, 0.45, [[1, 0, 0, 0], [0, 0, 1, 1]]),
        (top_p, 0.75, [[1, 0, 0, 1], [0, 1, 1, 1]]),  # 0.3 + 0.4 is less
        (top_p, 0.999, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (min_p, 0.25, [[1, 1, 0, 1], [1, 1, 1, 1]]),
        (min_p, 0.4, [[1, 0, 0, 1], [0, 1, 1, 1]]),
    ],
)
def test_filters_keep_what_they_should(warp, value, expected):
    logits = jnp.log(PROBS) - 3.0
    warped = warp(logits, value)
    assert kept(warped) == [list(map(bool, row)) for row in expected]
    np.testing.assert_array_equal(warped, np.where(np.array(expected, bool), logits, -np.inf))


def test_ties_stay_together():
    logits = jnp.array([[0.0, 1.0, 1.0, -0.0, -2.0]])
    assert kept(top_k(logits, 1)) == [[False, True, True, False, False]]
    assert kept(top_k(logits, 2)) == kept(top_k(logits, 1))
    assert kept(top_p(logits, 0.1)) == kept(top_k(logits, 1))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_thresholds_are_exact_at_any_scale(scale):
    logits = np.random.default_rng(0).normal(size=(3, 500)).astype(np.float32) * np.float32(scale)
    for k in (1, 7, 499):
        lowest = np.sort(logits, axis=1)[:, -k, None]
        np.testing.assert_array_equal(np.isfinite(top_k(jnp.asarray(logits), k)), logits >= lowest)


def test_filters_follow_each_other():
    """top_p is of what top_k has left: 0.5 and 0.3 become 0.625 and 0.375."""
    tokens, _ = choose(jnp.log(PROBS[:1]), jax.random.key(0)[None], 0, {"temperature": 1.0, "top_k": 2, "top_p": 0.6})
    assert tokens.tolist() == [0]
    assert list(WARPS) == ["temperature", "top_k", "top_p", "min_p"]


def test_without_a_temperature_the_likeliest_token_is_taken():
    tokens, logps = choose(jnp.log(PROBS), jax.random.split(jax.random.key(0), 2), 3, {})
    assert tokens.tolist() == [0, 3] and tokens.dtype == jnp.int32
    np.testing.assert_allclose(logps, np.log([0.5, 0.4]), rtol=1e-6)


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}])
def test_frequencies_are_those_of_the_softmax(options):
    draws, vocabulary = 20_000, 7
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(1, vocabulary)).astype(np.float32))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(draws))
    tokens, logps = jax.jit(choose)(jnp.repeat(logits, draws, axis=0), keys, 0, options)
    warped = logits / options["temperature"]
    expected = np.asarray(jax.nn.softmax(top_k(warped, options.get("top_k", vocabulary)))[0], np.float64)
    counts = np.bincount(tokens, minlength=vocabulary)
    drawn = expected > 0
    assert counts[~drawn].sum() == 0
    assert stats.chisquare(counts[drawn], draws * expected[drawn] / expected.sum()).pvalue > 1e-3
    np.testing.assert_allclose(logps, np.asarray(jax.nn.log_softmax(logits))[0, tokens], rtol=1e-5)


def test_another_step_draws_anew():
    logits, keys = jnp.zeros((200, 5)), jax.random.split(jax.random.key(0), 200)
    first, again, second = (choose(logits, keys, step, {"temperature": 1.0})[0] for step in (0, 0, 1))
    assert (first == again).all() and 0.1 < float((first == second).mean()) < 0.35
