"""Log-probabilities of completion tokens: the one path of every loss, of the reference pass and of evaluation.

Only the hidden states that predict a scored token ("slots") go through the LM head (`jaxdpo.lm_head`), so logits of
shape `[rows, length, vocab]` never exist. Sums are at least float32.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdpo import lm_head
from jaxdpo.models import Decoder
from jaxdpo.sharding import constrain, lengths_apart, rows_apart
from jaxdpo.types import Array, Batch


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
      statistics: names in `jaxdpo.lm_head.STATISTICS`.
    Returns:
      The log-probs and, by name, the statistics: `[rows, slots]` each, at least float32; 0 in empty slots.
    """
    return slot_statistics(decoder, params, decoder.hidden(params, batch), batch, statistics)


def slot_statistics(
    decoder: Decoder, params: dict, hidden: jax.Array, batch: Batch, statistics: Sequence[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`token_statistics` of states that are known: for models that have another head on them.

    Args:
      decoder, params, batch, statistics: as in `token_statistics`.
      hidden: `[rows, length, embed]`, from `decoder.hidden`.
    """
    # Whole rows: slots are anywhere in them.
    hidden = constrain(hidden, "batch", None, None)  # [rows, length, embed]
    scored = batch.slot_owner < batch.candidate_mask.shape[1] * batch.candidate_mask.shape[2]
    rows, slots = scored.shape
    parts, apart = math.gcd(rows, rows_apart()), lengths_apart()
    together = rows // parts  # rows whose slots are one list, those in use first, dealt to the devices that share a row
    chunks, width = head_chunks(together * slots, apart)
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
    of_chunks = lm_head.head_logps(dtype, tuple(statistics), head, split(states), target, used)

    def join(x: jax.Array) -> jax.Array:  # [chunks, parts * apart, width] -> [rows, slots]
        x = jnp.moveaxis(x.reshape(chunks, parts, apart, width), (0, 2), (1, 3)).reshape(parts, total)
        x = gather(x, jnp.argsort(order, axis=1))[:, : together * slots].reshape(rows, slots)
        return jnp.where(scored, constrain(x, "batch", None), 0.0)

    return jax.tree.map(join, of_chunks)


def head_chunks(slots: int, apart: int) -> tuple[int, int]:
    """Chunks that so many slots pass the LM head in, and how wide they are on each of the devices that share them."""
    chunks = -(-slots // (lm_head.SLOT_CHUNK * apart))
    return chunks, -(-slots // (chunks * apart))


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
