"""Who sees whom in a packed row of preference trees, and attention under that mask."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models import attention as attention_function
from jaxdpo.models import tree_mask

# One row: a group with prompt of 2 and candidates of 2 and 1, a group with prompt of 1 and a candidate of 2, padding.
POSITIONS = np.array([[0, 1, 2, 3, 2, 0, 1, 2, 0]])
GROUP = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0]])
CANDIDATE = np.array([[0, 0, 1, 1, 2, 0, 1, 1, 0]])


def test_mask_by_hand():
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(tree_mask(POSITIONS, GROUP, CANDIDATE)[0], np.array(expected, bool))


@pytest.mark.parametrize("window", [None, 1, 2, 3, 100])
def test_mask_is_the_rule(window):
    rng = np.random.default_rng(0)
    shape = (4, 13)
    positions, group, candidate = rng.integers(0, 9, shape), rng.integers(0, 4, shape), rng.integers(0, 3, shape)
    expected = np.zeros((4, 13, 13), bool)
    for row, q, k in np.ndindex(expected.shape):
        expected[row, q, k] = (
            group[row, q] == group[row, k] != 0
            and k <= q
            and candidate[row, k] in (0, candidate[row, q])
            and (window is None or positions[row, q] - positions[row, k] < window)
        )
    np.testing.assert_array_equal(tree_mask(positions, group, candidate, window=window), expected)


def random_qkv(dtype, heads=6, kv_heads=2):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (1, 9, n, 4), dtype) for key, n in zip(keys, (heads, kv_heads, kv_heads), strict=True)
    ]


def by_hand(q, k, v, mask):
    """The definition, head by head, in float64."""
    q, k, v = (np.asarray(x, np.float64)[0] for x in (q, k, v))
    out = np.zeros_like(q)
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        for i in range(len(q)):
            seen = np.flatnonzero(mask[0, i])
            if seen.size:
                scores = np.exp(q[i, head] @ k[seen, shared].T / np.sqrt(q.shape[-1]))
                out[i, head] = scores @ v[seen, shared] / scores.sum()
    return out[None]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_is_its_definition(dtype, tolerance, kv_heads):
    mask = tree_mask(POSITIONS, GROUP, CANDIDATE)
    q, k, v = random_qkv(dtype, kv_heads=kv_heads)
    out = attention_function(q, k, v, mask)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), by_hand(q, k, v, mask), rtol=0, atol=tolerance)


def test_padding_gives_zero_and_no_nan_in_gradients():
    mask = tree_mask(POSITIONS, GROUP, CANDIDATE)
    q, k, v = random_qkv("float32")
    np.testing.assert_array_equal(attention_function(q, k, v, mask)[0, -1], 0.0)
    nothing = jnp.zeros_like(mask)
    gradients = jax.grad(lambda *qkv: attention_function(*qkv, nothing).sum(), argnums=(0, 1, 2))(q, k, v)
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_huge_logits_stay_finite(scale):
    mask = tree_mask(POSITIONS, GROUP, CANDIDATE)
    q, k, v = random_qkv("float32")
    value, gradient = jax.value_and_grad(lambda q: attention_function(q, k, v, mask).sum())(q * scale)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_example_in_the_docstring():
    import importlib

    module = importlib.import_module("jaxdpo.models.attention")
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0
