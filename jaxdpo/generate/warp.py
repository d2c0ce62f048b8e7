"""From logits to a token: temperature, filters, and the draw.

An option that is not given is not computed: which there are decides the program, their values are traced. The filters
come in the order of `WARPS`, each on the distribution that the ones before have left, as in transformers. They find a
threshold by bisection over the ordered bits of the logits, which is exact, and takes a fraction of the time of a sort
of the vocabulary; so tokens of equal logits are kept or dropped together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Options = Mapping[str, jax.Array | float]
"""Name in `WARPS` -> its value; without a temperature the likeliest token is taken."""


def temperature(logits: jax.Array, value: jax.Array | float) -> jax.Array:
    """Divides the logits, which flattens the distribution above 1 and sharpens it below."""
    return logits / jnp.asarray(value, logits.dtype)


def top_k(logits: jax.Array, value: jax.Array | int) -> jax.Array:
    """Keeps the `value` likeliest tokens, and those as likely as the last of them.

    Example:
      >>> print(jnp.isfinite(top_k(jnp.log(jnp.array([[0.5, 0.1, 0.1, 0.3]])), 2)).astype(int))
      [[1 0 0 1]]
    """
    return _keep(logits, jnp.ones_like(logits), jnp.asarray(value, logits.dtype))


def top_p(logits: jax.Array, value: jax.Array | float) -> jax.Array:
    """Keeps a token unless those likelier than it have a probability of `value` together.

    References:
      Holtzman et al. 2020, https://arxiv.org/abs/1904.09751 (nucleus sampling).
    Example:
      >>> print(jnp.isfinite(top_p(jnp.log(jnp.array([[0.5, 0.15, 0.05, 0.3]])), 0.75)).astype(int))
      [[1 0 0 1]]
    """
    return _keep(logits, jax.nn.softmax(logits, axis=-1), jnp.asarray(value, logits.dtype))


def min_p(logits: jax.Array, value: jax.Array | float) -> jax.Array:
    """Keeps the tokens that have at least `value` times the probability of the likeliest.

    References:
      Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
    Example:
      >>> print(jnp.isfinite(min_p(jnp.log(jnp.array([[0.5, 0.15, 0.05, 0.3]])), 0.25)).astype(int))
      [[1 1 0 1]]
    """
    lowest = logits.max(axis=-1, keepdims=True) + jnp.log(jnp.asarray(value, logits.dtype))
    return jnp.where(logits >= lowest, logits, -jnp.inf)


WARPS: dict[str, Callable[[jax.Array, Any], jax.Array]] = {
    "temperature": temperature,
    "top_k": top_k,
    "top_p": top_p,
    "min_p": min_p,
}
"""What is done to logits `[rows, vocab]` before a token is drawn, in this order."""


def choose(logits: jax.Array, keys: jax.Array, step: jax.Array | int, options: Options) -> tuple[jax.Array, jax.Array]:
    """One token of every row.

    Args:
      logits: `[rows, vocab]`, at least float32.
      keys: `[rows]`, one of each sample; the same at all its steps.
      step: the token's index in its sample.
      options: which warps, and how strong.
    Returns:
      int32 `[rows]`, and their log-probs under the model itself: at temperature 1, without filters.
    """
    if options:
        warped = logits
        for name, warp in WARPS.items():
            if name in options:
                warped = warp(warped, options[name])
        draw = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))
        tokens = draw(keys, warped)
    else:
        tokens = logits.argmax(axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - jax.nn.logsumexp(logits, axis=-1)


def _keep(logits: jax.Array, weights: jax.Array, limit: jax.Array) -> jax.Array:
    """Logits of the tokens of which those with higher logits weigh less than `limit` together; -inf for the others."""
    order = _ordered(logits)
    info = jnp.iinfo(order.dtype)

    def halve(_: int, between: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = between  # the threshold is above `low`, and `high` at most
        middle = (low & high) + ((low ^ high) >> 1)
        enough = jnp.where(order > middle, weights, 0).sum(axis=-1, keepdims=True) < limit
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    ends = tuple(jnp.full((len(logits), 1), end, order.dtype) for end in (info.min, info.max))
    _, threshold = jax.lax.fori_loop(0, info.bits, halve, ends)
    return jnp.where(order >= threshold, logits, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """Whole numbers in the order of floating-point numbers: their bits, those of negative ones turned round."""
    info = jnp.finfo(x.dtype)
    bits = jax.lax.bitcast_convert_type(x, {32: jnp.int32, 64: jnp.int64}[info.bits])
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)
