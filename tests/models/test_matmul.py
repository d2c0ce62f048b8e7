"""Products of matrices and their gradients, in the dtypes that are promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdpo.models.matmul import linear, multiply, multiply_transposed

X = np.random.default_rng(0).normal(size=(24, 8))
KERNEL = np.random.default_rng(1).normal(size=(8, 16))


@pytest.mark.parametrize(
    ("dtype", "product_dtype", "tolerance"),
    [("float32", "float32", 1e-6), ("float32", "bfloat16", 1e-2), ("bfloat16", "bfloat16", 2e-2)],
)
def test_values_and_gradients(dtype, product_dtype, tolerance):
    x, kernel = jnp.asarray(X, dtype), jnp.asarray(KERNEL, "float32")
    out, pull = jax.vjp(lambda x, kernel: linear(x, kernel, product_dtype), x, kernel)
    of_x, of_kernel = pull(out)
    assert (out.dtype, of_x.dtype, of_kernel.dtype) == (dtype, dtype, "float32")
    expected = X @ KERNEL
    for got, want in ((out, expected), (of_x, expected @ KERNEL.T), (of_kernel, X.T @ expected)):
        np.testing.assert_allclose(np.asarray(got, float), want, rtol=0, atol=tolerance * np.abs(want).max())


def test_factors_are_rounded_and_sums_are_not():
    """Ones, and a factor that bfloat16 takes for 1: the sum of 257 products is exact, and a product is wide."""
    x, kernel = jnp.full((1, 257), 1 + 2**-10), jnp.ones((257, 1))
    assert linear(x, kernel, "bfloat16")[0, 0] == 257  # which bfloat16 does not hold
    assert linear(x, kernel, "float32")[0, 0] == 257 * (1 + 2**-10)
    narrow = jnp.ones((1, 257), "bfloat16")
    assert linear(narrow, kernel, "bfloat16").dtype == "bfloat16"
    assert multiply(narrow, kernel.astype("bfloat16"))[0, 0] == 257


def test_gradients_of_weights_are_not_rounded_to_bfloat16():
    """Sums of products of bfloat16 numbers are exact here in float32: 24 products of integers up to 8."""
    rng = np.random.default_rng(2)
    x, grad = (rng.integers(-8, 9, (24, 8)).astype(np.float32) for _ in range(2))
    _, pull = jax.vjp(lambda x, kernel: linear(x, kernel, "bfloat16"), jnp.asarray(x, "bfloat16"), jnp.ones((8, 8)))
    np.testing.assert_array_equal(pull(jnp.asarray(grad, "bfloat16"))[1], x.T @ grad)


@pytest.mark.parametrize("rows", [24, 23])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_are_wide_and_of_the_axes_asked_for(dtype, rows):
    left, right = X[:rows], X[:rows, :5] * 2
    x, y = jnp.asarray(left, dtype), jnp.asarray(right, dtype)
    for got, want in (
        (multiply(x, x, (1, 1)), left @ left.T),
        (multiply(x, y, (0, 0)), left.T @ right),
        (multiply_transposed(x, y, dtype), left.T @ right),
    ):
        assert got.dtype == "float32"
        np.testing.assert_allclose(got, want, rtol=0, atol={"float32": 1e-5, "bfloat16": 0.5}[dtype])
