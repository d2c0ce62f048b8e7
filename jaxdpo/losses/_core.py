"""What every loss does to its inputs first: check shapes, reach float32, and silence the candidates that do not count.

A mask applied to a loss's value alone leaks: `0 * nan` is nan, so a NaN in padding would still reach the gradient
through the branch that was not taken. `candidate_arrays` therefore masks the inputs (padding becomes 0, and a constant
has no gradient), and each loss masks its output once more. This is the double-`where` of
https://docs.jax.dev/en/latest/faq.html#gradients-contain-nan-where-using-where.
"""

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxdpo.types import InputError


@contextlib.contextmanager
def explain(message: str) -> Iterator[None]:
    """Turns a failed chex assertion into an `InputError` with a message that a user can act on."""
    try:
        yield
    except AssertionError:
        raise InputError(message) from None


def candidate_arrays(
    where: ArrayLike | None, needed: int, **arrays: ArrayLike
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Arrays in one float dtype with 0 at every candidate that does not count, and which candidates count.

    Args:
      where: `[..., candidates]` bool, which candidates exist; None: all.
      needed: existing candidates that a group needs to count; the candidates of smaller groups do not count either.
      **arrays: `[..., candidates]` of one shape, keyed by the caller's argument names for messages.
    Returns:
      The arrays in order, float64 if one of them is, else float32; and bool `[..., candidates]`.
    Raises:
      InputError: if a shape or the mask's dtype does not fit.
    """
    values = {name: jnp.asarray(array) for name, array in arrays.items()}
    first, *others = values
    shape = values[first].shape
    with explain(f"{first} has shape {shape}; allowed: [..., candidates] with one candidate or more"):
        chex.assert_axis_dimension_gt(values[first], -1, 0)
    for name in others:
        with explain(
            f"{name} has shape {values[name].shape}, {first} has {shape}; allowed: equal shapes [..., candidates]; "
            "pass one number per candidate in both"
        ):
            chex.assert_equal_shape([values[name], values[first]])
    exists = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    with explain(
        f"where is {exists.dtype} of shape {exists.shape}; allowed: bool of the shape of {first}, {shape}; "
        "pass the candidate mask, one bool per candidate"
    ):
        chex.assert_type(exists, bool)
        chex.assert_shape(exists, shape)
    exists &= exists.sum(axis=-1, keepdims=True) >= needed
    dtype = jnp.float64 if any(value.dtype == jnp.float64 for value in values.values()) else jnp.float32
    return tuple(jnp.where(exists, value.astype(dtype), 0) for value in values.values()), exists


def token_arrays(where: ArrayLike | None, **arrays: ArrayLike) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Arrays in one float dtype with 0 at every token that is not real, and which tokens are real, `[..., tokens]`."""
    values = {name: jnp.asarray(array) for name, array in arrays.items()}
    first, *others = values
    shape = values[first].shape
    for name in others:
        with explain(
            f"{name} has shape {values[name].shape}, {first} has {shape}; allowed: equal shapes [..., tokens]; "
            "pass one number per token in both"
        ):
            chex.assert_equal_shape([values[name], values[first]])
    real = jnp.ones(shape, bool) if where is None else jnp.asarray(where)
    with explain(
        f"where is {real.dtype} of shape {real.shape}; allowed: bool of the shape of {first}, {shape}; "
        "pass the token mask, one bool per token"
    ):
        chex.assert_type(real, bool)
        chex.assert_shape(real, shape)
    dtype = jnp.float64 if any(value.dtype == jnp.float64 for value in values.values()) else jnp.float32
    return tuple(jnp.where(real, value.astype(dtype), 0) for value in values.values()), real


def option(name: str, value: ArrayLike, allowed: str, holds: Callable[[float], bool], dtype: jnp.dtype) -> jax.Array:
    """A scalar option in the data's dtype, its range checked where it is a plain number (a traced value has none yet).

    Raises:
      InputError: if the number is out of range, or the value is not a scalar.
    """
    if isinstance(value, numbers.Real) and not holds(float(value)):
        raise InputError(f"{name}={value} is out of range; allowed: {allowed}")
    scalar = jnp.asarray(value, dtype)
    with explain(f"{name} has shape {scalar.shape}; allowed: a scalar; use jax.vmap for several values"):
        chex.assert_rank(scalar, 0)
    return scalar


def beta_option(beta: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """The strength of the KL penalty, see `option`."""
    return option("beta", beta, "above 0, such as 0.1", lambda b: 0 < b < math.inf, dtype)


def smoothing_option(label_smoothing: ArrayLike, dtype: jnp.dtype) -> jax.Array:
    """The probability that a label is flipped, see `option`."""
    return option("label_smoothing", label_smoothing, "0 to below 0.5, such as 0.1", lambda e: 0 <= e < 0.5, dtype)


def check_pair(array: jax.Array) -> None:
    """Raises InputError where the last axis does not hold two candidates."""
    with explain(
        f"{array.shape[-1]} candidates on the last axis of shape {array.shape}; allowed: 2, chosen then rejected; "
        "for rankings use the Plackett-Luce losses"
    ):
        chex.assert_axis_dimension(array, -1, 2)


def best_candidate(exists: jax.Array) -> jax.Array:
    """bool `[..., candidates]`: the first candidate of each group that exists."""
    return exists & (jnp.cumsum(exists, axis=-1) == 1)


def given_targets(targets: ArrayLike, where: ArrayLike | None, like: jax.Array) -> jax.Array:
    """A target distribution `[..., candidates]` in the dtype of `like`, 0 where a candidate does not count."""
    (_, targets), _ = candidate_arrays(where, 2, policy_logps=like, targets=targets)
    return targets.astype(like.dtype)
