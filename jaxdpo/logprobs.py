"""Log-probabilities of completion tokens: the one path of every loss, of the reference pass and of evaluation.

Only the hidden states that predict a scored token ("slots") go through the LM head, in chunks of slots, so logits of
shape `[rows, length, vocab]` never exist. Log-sum-exp and sums are at least float32.
"""

import jax
import jax.numpy as jnp

from jaxdpo.models import Decoder, full_precision
from jaxdpo.sharding import constrain
from jaxdpo.types import Array, Batch

SLOT_CHUNK = 128
"""Slots of each row that pass the LM head at once: `rows * 128 * vocab` logits are live (25 MiB a row at 49152)."""


def token_logps(decoder: Decoder, params: dict, batch: Batch) -> jax.Array:
    """Log-probability of every scored completion token.

    Args:
      decoder: the model; static under jit.
      params: its parameters.
      batch: preference trees.
    Returns:
      `[rows, slots]` at least float32, nats; 0 in empty slots.
    """
    hidden = decoder.hidden(params, batch)  # [rows, length, embed]
    head = constrain(decoder.head(params), "vocab", None)  # gathered over fsdp once, outside the chunk loop
    scored = batch.slot_owner < batch.candidate_mask.shape[1] * batch.candidate_mask.shape[2]  # [rows, slots]
    rows, slots = scored.shape
    chunks = -(-slots // SLOT_CHUNK)
    width = -(-slots // chunks)
    pad = ((0, 0), (0, chunks * width - slots))

    def split(x: Array) -> jax.Array:  # [rows, slots, ...] -> [chunks, rows, width, ...]
        return jnp.pad(x, pad + ((0, 0),) * (x.ndim - 2)).reshape(rows, chunks, width, *x.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def chunk_logps(head: jax.Array, states: jax.Array, target: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(states.dtype, jnp.float32)
        logits = jnp.einsum(
            "rwe,ve->rwv", states, head, preferred_element_type=dtype, precision=full_precision(states.dtype)
        )
        logits = constrain(logits, "batch", None, "vocab")
        picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]  # [rows, width]
        return picked - jax.nn.logsumexp(logits, axis=-1)  # [rows, width]

    states = constrain(jnp.take_along_axis(hidden, batch.slot_source[..., None], axis=1), "batch", None, None)
    _, logps = jax.lax.scan(
        lambda carry, chunk: (carry, chunk_logps(head, *chunk)), None, (split(states), split(batch.slot_target))
    )  # [chunks, rows, width]
    logps = logps.swapaxes(0, 1).reshape(rows, chunks * width)[:, :slots]  # [rows, slots]
    return jnp.where(scored, logps, 0.0)


def sequence_logps(token_logps: Array, batch: Batch) -> jax.Array:
    """Log-probability of every completion: the sum of its tokens'.

    Args:
      token_logps: `[rows, slots]` nats, of a policy or of the reference.
      batch: the batch they belong to.
    Returns:
      `[rows, groups, candidates]`, nats; 0 for an absent candidate.
    References:
      Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, Eq. 7: sums over tokens, not means.
    """
    groups, candidates = batch.candidate_mask.shape[1:]
    owned = (
        batch.slot_owner[..., None] == jnp.arange(groups * candidates)[None, None]
    )  # [rows, slots, groups * candidates]
    # A masked sum rather than a matrix product with the ownership matrix: TPUs would round that to bfloat16.
    sums = jnp.where(owned, jnp.asarray(token_logps)[..., None], 0.0).sum(axis=1)  # [rows, groups * candidates]
    return sums.reshape(-1, groups, candidates)
