"""Log-probabilities of completion tokens: the one path of every loss, of the reference pass and of evaluation.

Only the hidden states that predict a scored token ("slots") go through the LM head, in chunks of slots, so logits of
shape `[rows, length, vocab]` never exist. Log-sum-exp and sums are at least float32.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxdpo.models import Decoder
from jaxdpo.models.matmul import multiply, multiply_transposed, wide_dtype
from jaxdpo.sharding import constrain, lengths_apart, rows_apart
from jaxdpo.types import Array, Batch

SLOT_CHUNK = 128
"""Slots of each row that pass the LM head at once: `rows * 128 * vocab` logits are live (25 MiB a row at 49152)."""


def _log_sum_sq_probs(logits: jax.Array, log_z: jax.Array, target: jax.Array) -> jax.Array:
    del target
    return jax.nn.logsumexp(2 * logits, axis=-1) - 2 * log_z


def _entropy(logits: jax.Array, log_z: jax.Array, target: jax.Array) -> jax.Array:
    del target
    return log_z - (jnp.exp(logits - log_z[..., None]) * logits).sum(axis=-1)


def _correct(logits: jax.Array, log_z: jax.Array, target: jax.Array) -> jax.Array:
    return (logits.argmax(axis=-1) == target).astype(log_z.dtype)


STATISTICS: dict[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = {
    "log_sum_sq_probs": _log_sum_sq_probs,
    "entropy": _entropy,
    "correct": _correct,
}
"""What a slot can tell besides its log-prob: `(logits [..., vocab], log-sum-exp of them [...], target [...]) -> [...]`.

`log_sum_sq_probs` is the log of the sum of squared probabilities over the vocabulary, nats, which WPO weighs by;
`entropy` is that of the prediction, nats; `correct` is 1 where the target is the likeliest token, else 0.
"""


def token_logps(decoder: Decoder, params: dict, batch: Batch) -> jax.Array:
    """Log-probability of every scored completion token.

    Args:
      decoder: the model; static under jit.
      params: its parameters.
      batch: preference trees.
    Returns:
      `[rows, slots]` at least float32, nats; 0 in empty slots.
    """
    return token_statistics(decoder, params, batch)[0]


def token_statistics(
    decoder: Decoder, params: dict, batch: Batch, statistics: Sequence[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`token_logps`, and statistics of the same pass through the LM head, without gradient.

    Args:
      decoder: the model; static under jit.
      params: its parameters.
      batch: preference trees.
      statistics: names in `STATISTICS`.
    Returns:
      The log-probs and, by name, the statistics: `[rows, slots]` each, at least float32; 0 in empty slots.
    """
    # Whole rows: slots are anywhere in them.
    hidden = constrain(decoder.hidden(params, batch), "batch", None, None)  # [rows, length, embed]
    scored = batch.slot_owner < batch.candidate_mask.shape[1] * batch.candidate_mask.shape[2]
    rows, slots = scored.shape
    parts, apart = math.gcd(rows, rows_apart()), lengths_apart()
    together = rows // parts  # rows whose slots are one list, those in use first, dealt to the devices that share a row
    chunks = -(-slots // SLOT_CHUNK)
    width = -(-together * slots // (chunks * apart))
    total = chunks * width * apart

    def listed(x: Array) -> jax.Array:  # [rows, slots] -> [parts, total]
        return jnp.pad(x.reshape(parts, -1), ((0, 0), (0, total - together * slots)))

    def gather(x: jax.Array, places: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, places, axis=1)

    def split(x: jax.Array) -> jax.Array:  # [parts, total, ...] -> [chunks, parts * apart, width, ...]
        x = x.reshape(parts, chunks, width, apart, *x.shape[2:])
        x = jnp.moveaxis(x, (1, 3), (0, 2)).reshape(chunks, parts * apart, width, *x.shape[4:])
        return constrain(x, None, "slots", *(None,) * (x.ndim - 2))

    order = jnp.argsort(~listed(scored), axis=1, stable=True)  # [parts, total]
    source = batch.slot_source + hidden.shape[1] * (jnp.arange(rows) % together)[:, None]  # in the rows of its part
    states = gather(hidden.reshape(parts, -1, hidden.shape[-1]), gather(listed(source), order)[..., None])
    used = -(-scored.reshape(parts, -1).sum(axis=1).max() // (width * apart))
    target = split(gather(listed(batch.slot_target), order))
    dtype, head = decoder.multiplied_dtype, decoder.head(params)
    of_chunks = _through_head(dtype, tuple(statistics), head, split(states), target, used)

    def join(x: jax.Array) -> jax.Array:  # [chunks, parts * apart, width] -> [rows, slots]
        x = jnp.moveaxis(x.reshape(chunks, parts, apart, width), (0, 2), (1, 3)).reshape(parts, total)
        x = gather(x, jnp.argsort(order, axis=1))[:, : together * slots].reshape(rows, slots)
        return jnp.where(scored, constrain(x, "batch", None), 0.0)

    return jax.tree.map(join, of_chunks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _through_head(
    dtype: jnp.dtype,
    statistics: tuple[str, ...],
    head: jax.Array,
    states: jax.Array,
    target: jax.Array,
    used: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Log-probs and statistics of chunks of slots.

    The backward pass computes logits again: it writes an array of their size once, and none waits for it. On a mesh the
    head is gathered once in each pass, in `dtype`; every device sums up the gradient of its own part, which is reduced
    once.

    Args:
      dtype: of the factors of matrix products.
      statistics: names in `STATISTICS`.
      head: `[vocab, embed]`.
      states: `[chunks, parts, width, embed]`, one part for each device.
      target: int `[chunks, parts, width]`.
      used: how many chunks, the first ones, are computed; the others get 0.
    Returns:
      `[chunks, parts, width]` each; gradients are those of the log-probs.
    """
    return _head_forward(dtype, statistics, head, states, target, used)[0]


def _gathered(head: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return constrain(head.astype(dtype), "vocab", None)


def _logits(head: jax.Array, states: jax.Array) -> jax.Array:
    """`[parts, width, vocab]` of states `[parts, width, embed]`, at least float32; factors as the head is."""
    logits = multiply(states.reshape(-1, states.shape[-1]).astype(head.dtype), head, (1, 1))
    return constrain(logits.astype(wide_dtype(states.dtype)).reshape(*states.shape[:2], -1), "slots", None, "vocab")


def _head_forward(
    dtype: jnp.dtype,
    statistics: tuple[str, ...],
    head: jax.Array,
    states: jax.Array,
    target: jax.Array,
    used: jax.Array,
) -> tuple:
    rounded = _gathered(head, dtype)

    def add(i: jax.Array, done: tuple) -> tuple:
        logits = _logits(rounded, states[i])
        picked = jnp.take_along_axis(logits, target[i][..., None], axis=-1)[..., 0]  # [parts, width]
        log_z = jax.nn.logsumexp(logits, axis=-1)  # [parts, width]
        more = picked - log_z, log_z, {name: STATISTICS[name](logits, log_z, target[i]) for name in statistics}
        return jax.tree.map(lambda x, of_chunk: x.at[i].set(of_chunk), done, more)

    zeros = jnp.zeros(target.shape, wide_dtype(states.dtype))
    logps, log_z, of_statistics = lax.fori_loop(0, used, add, (zeros, zeros, dict.fromkeys(statistics, zeros)))
    return (logps, of_statistics), (head, states, target, used, log_z)


def _head_backward(dtype: jnp.dtype, statistics: tuple[str, ...], kept: tuple, grads: tuple) -> tuple:
    del statistics
    head, states, target, used, log_z = kept
    rounded = _gathered(head, dtype)

    def add(i: jax.Array, done: tuple) -> tuple:
        of_head, of_states = done
        logits = _logits(rounded, states[i])
        hit = lax.broadcasted_iota(target.dtype, logits.shape, 2) == target[i][..., None]
        of_logits = grads[0][i][..., None] * (hit - jnp.exp(logits - log_z[i][..., None]))
        of_logits = constrain(of_logits.astype(dtype), "slots", None, "vocab")
        flat = of_logits.reshape(-1, len(head))
        of_chunk = multiply(flat, rounded).reshape(states.shape[1:]).astype(states.dtype)
        return of_head + by_part(of_logits, states[i]), of_states.at[i].set(of_chunk)

    by_part = jax.vmap(lambda x, y: multiply_transposed(x, y, dtype))
    zeros = jnp.zeros((states.shape[1], *head.shape), wide_dtype(head.dtype))
    of_head, of_states = lax.fori_loop(0, used, add, (constrain(zeros, "slots", "vocab", None), jnp.zeros_like(states)))
    return constrain(of_head.sum(axis=0).astype(head.dtype), "vocab", "embed"), of_states, None, None


_through_head.defvjp(_head_forward, _head_backward)


def sequence_logps(token_logps: Array, batch: Batch, *, tail_weight: Array | float | None = None) -> jax.Array:
    """Log-probability of every completion: the sum of its tokens'.

    Args:
      token_logps: `[rows, slots]` nats, of a policy or of the reference; any other number per slot sums up alike.
      batch: the batch they belong to.
      tail_weight: what tokens count that stand behind the length of the group's shortest completion, in [0, 1]; None:
        as much as the others. This is the `ld_alpha` of length-desensitised DPO.
    Returns:
      `[rows, groups, candidates]`, nats; 0 for an absent candidate.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7: sums over tokens, not means; Liu et al. 2024,
      https://arxiv.org/abs/2409.06411, for `tail_weight`.
    """
    groups, candidates = batch.candidate_mask.shape[1:]
    owned = _owned(batch)  # [rows, slots, groups * candidates]
    values = jnp.asarray(token_logps)[..., None]  # [rows, slots, 1]
    if tail_weight is not None:
        lengths = candidate_lengths(batch)  # [rows, groups, candidates]
        shortest = jnp.where(batch.candidate_mask, lengths, jnp.inf).min(axis=-1, keepdims=True)
        shared = jnp.broadcast_to(shortest, lengths.shape).reshape(-1, 1, groups * candidates)
        values = jnp.where(jnp.cumsum(owned, axis=1) <= shared, values, tail_weight * values)  # slots in their order
    # A masked sum rather than a matrix product with the ownership matrix: TPUs would round that to bfloat16.
    sums = jnp.where(owned, values, 0.0).sum(axis=1)  # [rows, groups * candidates]
    return sums.reshape(-1, groups, candidates)


def candidate_lengths(batch: Batch) -> jax.Array:
    """Scored tokens of every completion, its EOS included: float32 `[rows, groups, candidates]`; 0 where absent."""
    groups, candidates = batch.candidate_mask.shape[1:]
    return _owned(batch).sum(axis=1).astype(jnp.float32).reshape(-1, groups, candidates)


def _owned(batch: Batch) -> jax.Array:
    """bool `[rows, slots, groups * candidates]`: whose token a slot scores."""
    groups, candidates = batch.candidate_mask.shape[1:]
    return jnp.asarray(batch.slot_owner)[..., None] == jnp.arange(groups * candidates)[None, None]
