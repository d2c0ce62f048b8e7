"""Matrix products as a model needs them: factors in the compute dtype, sums and gradients of weights in float32.

What XLA derives by itself multiplies float32 cotangents with bfloat16 weights, in float32, and sums gradients of
weights in bfloat16. Here both factors of a product have the compute dtype, so that it runs at the rate of that dtype.
"""

import jax
import jax.numpy as jnp
from jax import lax


def full_precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Matrix products of float32 arrays are rounded to bfloat16 on TPU and TF32 on GPU unless this is asked for."""
    return lax.Precision.HIGHEST if jnp.finfo(dtype).bits >= 32 else None


def wide_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """At least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def multiply(x: jax.Array, y: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """The product of two matrices of one dtype over one axis of each; at least float32."""
    # Not `x @ y.T`: XLA's CPU has no bfloat16 kernel for a product with a transpose, but has one for these axes.
    axes = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(
        x, y, axes, preferred_element_type=wide_dtype(x.dtype), precision=full_precision(x.dtype)
    )  # [size of the other axis of x, that of y]


def multiply_transposed(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x.T @ y`, as `multiply`."""
    if x.dtype != jnp.bfloat16:
        return multiply(x, y, (0, 0))
    # XLA's CPU has no bfloat16 kernel for it; asked for one it converts, or fails with "unsupported element type".
    return lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: multiply(x.astype(jnp.float32), y.astype(jnp.float32), (0, 0)),
        default=lambda x, y: multiply(x, y, (0, 0)),
    )


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`.

    Args:
      x: `[tokens, inputs]` in the compute dtype.
      kernel: `[inputs, outputs]` float32 master weights; its gradient is summed in at least float32.
    Returns:
      `[tokens, outputs]`, dtype of `x`.
    """
    return _linear(x, kernel)[0]


def _linear(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return multiply(x, kernel.astype(x.dtype)).astype(x.dtype), (x, kernel)


def _linear_gradients(kept: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    of_x = multiply(grad, kernel.astype(x.dtype), (1, 1)).astype(x.dtype)
    return of_x, multiply_transposed(x, grad).astype(kernel.dtype)


linear.defvjp(_linear, _linear_gradients)
