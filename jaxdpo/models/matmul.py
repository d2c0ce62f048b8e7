"""Matrix products as a model needs them: factors in the compute dtype, sums and gradients of weights in float32.

What XLA derives by itself multiplies float32 cotangents with bfloat16 weights, in float32, and sums gradients of
weights in bfloat16. Here both factors of a product have the compute dtype, so that it runs at the rate of that dtype.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxdpo.types import InputError

COMPUTE_DTYPES = ("float32", "bfloat16", "float64")


def check_compute_dtype(name: str) -> None:
    """InputError for a dtype that models do not compute in, or that jax would truncate."""
    if name not in COMPUTE_DTYPES:
        raise InputError(f"compute_dtype is {name!r}; allowed: {', '.join(COMPUTE_DTYPES)}")
    if name == "float64" and jnp.result_type(float) != jnp.float64:
        raise InputError("compute_dtype is 'float64' but jax would truncate it; set jax_enable_x64")


def full_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Matrix products of float32 arrays are rounded to bfloat16 on TPU and TF32 on GPU unless this is asked for."""
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """At least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def multiply(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (-1, 0)) -> jax.Array:
    """The product of two arrays of one dtype over one axis of each; at least float32."""
    # Not `x @ y.T`: XLA's CPU has no bfloat16 kernel for a product with a transpose, but has one for these axes.
    axes = (((contract[0] % x.ndim,), (contract[1],)), ((), ()))
    return lax.dot_general(
        x, y, axes, preferred_element_type=wide_dtype(x.dtype), precision=full_precision(x.dtype)
    )  # [sizes of the other axes of x, those of y]


def multiply_few(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x @ kernel.T` for a few rows of `x`, as decoding has them: the kernel is read once, as it lies in memory.

    Args:
      x: `[rows, inputs]`.
      kernel: `[outputs, inputs]`.
      dtype: what the factors are rounded to.
    Returns:
      `[rows, outputs]`, at least float32.
    """
    # The barriers keep XLA from folding the transposes into the product. On CPUs it has a kernel for a product in this
    # order that takes half the time of those for the others.
    columns = lax.optimization_barrier(x.astype(dtype).T)  # [inputs, rows]
    return lax.optimization_barrier(multiply(kernel.astype(dtype), columns)).T


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x @ kernel`.

    Args:
      x: `[..., inputs]`.
      kernel: `[inputs, outputs]`, its gradient is summed in at least float32.
      dtype: what the factors of the product, and of those in the backward pass, are rounded to.
    Returns:
      `[..., outputs]`, dtype of `x`.
    """
    return _linear(x, kernel, dtype)[0]


def _linear(x: jax.Array, kernel: jax.Array, dtype: jnp.dtype) -> tuple:
    return multiply(x.astype(dtype), kernel.astype(dtype)).astype(x.dtype), (x, kernel)


def _linear_gradients(dtype: jnp.dtype, kept: tuple, grad: jax.Array) -> tuple:
    x, kernel = kept
    of_x = multiply(grad.astype(dtype), kernel.astype(dtype), (-1, 1)).astype(x.dtype)
    return of_x, multiply_transposed(x, grad, dtype).astype(kernel.dtype)


linear.defvjp(_linear, _linear_gradients)


def multiply_transposed(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The product of `[..., m]` and `[..., n]` over all other axes, factors rounded to `dtype`: `[m, n]`, at least
    float32; `x.T @ y` for two matrices."""

    def product(x: jax.Array, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
        axes = tuple(range(x.ndim - 1))
        x, y = x.astype(dtype), y.astype(dtype)
        return lax.dot_general(
            x, y, ((axes, axes), ((), ())), preferred_element_type=wide_dtype(dtype), precision=full_precision(dtype)
        )

    def over_two_axes(x: jax.Array, y: jax.Array) -> jax.Array:
        return product(x.reshape(2, -1, x.shape[-1]), y.reshape(2, -1, y.shape[-1]), dtype)

    def exact(x: jax.Array, y: jax.Array) -> jax.Array:
        return product(x, y, jnp.float32)

    if jnp.dtype(dtype) != jnp.bfloat16:
        return product(x, y, dtype)
    # XLA's CPU has a bfloat16 kernel for factors in the order of `x @ y`. A product over two axes it brings into that
    # order; one over the first axes it converts to float32, or fails with "unsupported element type".
    on_cpu = exact if math.prod(x.shape[:-1]) % 2 else over_two_axes
    return lax.platform_dependent(x, y, cpu=on_cpu, default=lambda x, y: product(x, y, dtype))
