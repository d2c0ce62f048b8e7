"""From log-probabilities to scores, and differences of scores that keep float32 exact.

Two log-probabilities near -2000 differ by a log-ratio, and two log-ratios near 1000 by a margin of a few nats. Each
subtraction rounds to the last digit of a large number (1.2e-4 at 2000), and a loss that divides by a temperature of
0.05 shows it. So a difference is carried as two floats: the rounded one and, found by Knuth's two-sum, what rounding
lost.
"""

import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.losses._core import beta_option, candidate_arrays, check_pair


class Wide(NamedTuple):
    """Numbers `value + rest`, to more digits than their dtype has."""

    value: jax.Array
    rest: jax.Array


def difference(a: jax.Array, b: jax.Array) -> Wide:
    """`a - b` exactly; `rest` has no gradient."""
    value = a - b
    a, b, rounded = jax.lax.stop_gradient((a, b, value))
    minus_b = rounded - a
    return Wide(value, (a - (rounded - minus_b)) - (b + minus_b))


def subtract(a: Wide, b: Wide) -> jax.Array:
    """`a - b`, rounded once."""
    return (a.value - b.value) + (a.rest - b.rest)


def candidate(scores: Wide, index: int) -> Wide:
    """The candidate at a place of the last axis, `[..., candidates]` to `[...]`."""
    return Wide(scores.value[..., index], scores.rest[..., index])


def subtract_best(scores: Wide, exists: jax.Array) -> jax.Array:
    """Scores less the largest of their group, `[..., candidates]`; 0 where a candidate does not exist.

    The largest is a constant here: nothing that is invariant to a shift of all scores has a gradient in it.
    """
    constant = jax.lax.stop_gradient(scores)
    index = jnp.argmax(jnp.where(exists, constant.value, -jnp.inf), axis=-1, keepdims=True)  # [..., 1]
    best = Wide(*(jnp.take_along_axis(part, index, axis=-1) for part in constant))
    return jnp.where(exists, subtract(scores, best), 0)


def per_token(scores: Wide, lengths: jax.Array) -> Wide:
    """`scores / lengths`: whole nats per token, which are exact, and the rest. A length of 0 counts as 1."""
    lengths = jnp.maximum(lengths, 1)
    rest = jnp.fmod(scores.value, lengths)  # exact, and all of the gradient: the whole part is constant between steps
    # Rounded since XLA divides by constants through their reciprocals, which is not exact.
    return Wide(jnp.round((scores.value - rest) / lengths), (rest + scores.rest) / lengths)


def half_inverse(beta: ArrayLike, dtype: jnp.dtype) -> Wide:
    """`1 / (2 beta)` of a beta in range: 500 for 0.001, which float32 does not hold, so to more digits if it may be."""
    value = 0.5 / beta_option(beta, dtype)
    if not isinstance(beta, numbers.Real):
        return Wide(value, jnp.zeros_like(value))
    exact = 0.5 / float(beta)
    rounded = float(dtype.type(exact))
    return Wide(jnp.asarray(rounded, dtype), jnp.asarray(exact - rounded, dtype))


def candidate_scores(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    divergence: Callable[[jax.Array], jax.Array],
    where: ArrayLike | None,
) -> tuple[Wide, jax.Array]:
    """Scores `[..., candidates]`, and bool `[..., candidates]`: which candidates count, of groups of two or more."""
    arrays = {"policy_logps": policy_logps} | ({} if ref_logps is None else {"ref_logps": ref_logps})
    (policy, *reference), exists = candidate_arrays(where, 2, **arrays)
    ratio = difference(policy, reference[0]) if reference else Wide(policy, jnp.zeros_like(policy))
    # A score of `value + rest` is, to first order and far below rounding, score(value) + score'(value) * rest.
    return Wide(*jax.jvp(divergence, (ratio.value,), (ratio.rest,))), exists


def pair_logits(
    policy_logps: ArrayLike,
    ref_logps: ArrayLike | None,
    *,
    beta: ArrayLike,
    divergence: Callable[[jax.Array], jax.Array],
    where: ArrayLike | None,
) -> tuple[jax.Array, jax.Array]:
    """`beta * (score of chosen - score of rejected)` `[...]`, and bool `[...]`: which pairs are complete."""
    scores, exists = candidate_scores(policy_logps, ref_logps, divergence, where)  # [..., 2]
    check_pair(scores.value)
    margin = subtract(candidate(scores, 0), candidate(scores, 1))  # [...]
    return beta_option(beta, margin.dtype) * margin, exists.all(axis=-1)
