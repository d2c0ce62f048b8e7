"""Attention by blocks of queries and keys, which skips every block of keys that no query of a block sees.

Time grows with the pairs of blocks that see each other, so with the lengths of groups, not with the length of the row
they are packed into; memory grows linearly with the length. The blocks of one row and key/value head follow each
other, each of plain two-dimensional matrix products: XLA multiplies batches of matrices on CPUs at a fraction of that
rate. Backward pass: Dao et al. 2022, https://arxiv.org/abs/2205.14135, section 3.1 and algorithm 4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxdpo.models.matmul import multiply, multiply_transposed, wide_dtype
from jaxdpo.sharding import lengths_apart, map_heads

BLOCK = 64
"""Queries and keys of a block. Its scores stay in the cache of a core (SmolLM2's 3 heads: 48 KiB), and little is
computed for nothing where groups end."""

KEY_BLOCKS = "key_blocks"
"""What the loops over blocks of keys are called in a compiled program: how often they go round depends on the rows."""


class Blocks(NamedTuple):
    """Which blocks of a row see each other; `length` is a multiple of `BLOCK` on each device that it is split over,
    `blocks = length / BLOCK`."""

    positions: jax.Array
    """int `[rows, length]`, as `group` and `candidate` those of the batch, padded."""
    group: jax.Array
    candidate: jax.Array
    keys: jax.Array
    """int32 `[rows, blocks, blocks]`: for each block of queries those of keys, the ones that it sees first."""
    num_keys: jax.Array
    """int32 `[rows, blocks]`: how many it sees; none where there is only padding."""
    window: jax.Array | None
    """int32 `[rows]`: the sliding window, the same for all rows; None without one."""


def find_blocks(positions: jax.Array, group: jax.Array, candidate: jax.Array, *, window: int | None = None) -> Blocks:
    """Which blocks of keys each block of queries needs: those with a key that one of its queries sees, and few others.

    Args:
      positions: int `[rows, length]` position in the path.
      group: int `[rows, length]` 0 for padding at the end of a row; otherwise it never falls along a row.
      candidate: int `[rows, length]` 0 for the prompt; within a group it never falls.
      window: as in `tree_mask`.
    """
    rows, length = group.shape
    apart = lengths_apart()
    blocks = -(-length // (BLOCK * apart)) * apart
    pad = ((0, 0), (0, blocks * BLOCK - length))
    positions, group, candidate = (jnp.pad(x, pad) for x in (positions, group, candidate))
    ids, of = group.reshape(rows, blocks, BLOCK), candidate.reshape(rows, blocks, BLOCK)
    highest = jnp.iinfo(ids.dtype).max
    first = jnp.where(ids > 0, ids, highest).min(axis=-1)  # [rows, blocks] first group of a block
    last = ids.max(axis=-1)  # its last group, 0 if it is all padding
    in_last = (ids == last[..., None]) & (ids > 0)
    # A block of keys shares one group at most with a later block of queries: its own last and the other's first.
    lowest = jnp.where(ids == first[..., None], of, highest).min(axis=-1)  # [rows, blocks] a query's first candidate
    largest = jnp.where(in_last, of, -1).max(axis=-1)  # a key's last candidate
    prompt = (in_last & (of == 0)).any(axis=-1)
    query, key = (slice(None), slice(None), None), (slice(None), None, slice(None))
    earlier = jnp.tril(jnp.ones((1, blocks, blocks), bool), -1)
    needed = earlier & (first[query] == last[key]) & (prompt[key] | (largest[key] >= lowest[query]))
    if window is not None:
        at = positions.reshape(rows, blocks, BLOCK)
        nearest = jnp.where(ids == first[..., None], at, highest).min(axis=-1)  # [rows, blocks]
        furthest = jnp.where(in_last, at, -highest // 2).max(axis=-1)
        needed &= nearest[query] - furthest[key] < window
    needed |= jnp.eye(blocks, dtype=bool)[None] & (last > 0)[query]
    keys = jnp.argsort(~needed, axis=-1, stable=True)
    num_keys = needed.sum(axis=-1, dtype=jnp.int32)
    windows = None if window is None else jnp.full(rows, window, jnp.int32)
    return Blocks(positions, group, candidate, keys.astype(jnp.int32), num_keys, windows)


def blockwise_attention(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks) -> jax.Array:
    """Scaled dot-product attention over packed preference trees, as `attention` under the mask of `tree_mask`.

    Scores and softmax are at least float32. The output and the log-sum-exp of the scores are named "attention" for
    policies of recomputation.

    Args:
      q: `[rows, length, heads, head_dim]`.
      k: `[rows, length, kv_heads, head_dim]`.
      v: as `k`.
      blocks: of these rows, from `find_blocks`.
    Returns:
      `[rows, length, heads, head_dim]`, dtype of `q`; zero at padding.
    """
    length, pad = q.shape[1], blocks.group.shape[1] - q.shape[1]
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    out = map_heads(_attend)(q, k, v, blocks)
    return out[:, :length]


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, first: jax.Array) -> jax.Array:
    """`blockwise_attention` of whole blocks on one device, whose queries begin at `first`."""
    return _forward(q, k, v, blocks, first)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks, first: jax.Array) -> tuple:
    """The output and what the backward pass needs."""
    wide, kv_heads = wide_dtype(q.dtype), k.shape[2]
    queries = _by_head(q * q.shape[-1] ** -0.5, kv_heads)  # [rows * kv_heads, blocks, shared * BLOCK, head_dim]

    def one_head(_: None, inputs: tuple) -> tuple[None, tuple]:
        queries, keys, values, row = inputs
        row = jax.tree.map(lambda x: x[row], blocks)

        def one_block(_: None, inputs: tuple) -> tuple[None, tuple]:
            q, i = inputs

            def add(n: jax.Array, sums: tuple) -> tuple:
                total, highest, norm = sums
                j = row.keys[i, n]
                scores = _scores(q, _block(keys, j), row, i, j)
                higher = jnp.maximum(highest, scores.max(axis=-1))
                weights = jnp.exp(scores - higher[:, None])  # [shared * BLOCK, BLOCK]
                decay = jnp.exp(highest - higher)
                more = multiply(weights.astype(v.dtype), _block(values, j))
                return total * decay[:, None] + more, higher, norm * decay + weights.sum(axis=-1)

            start = (jnp.zeros(q.shape, wide), jnp.full(len(q), _unseen(wide)), jnp.zeros(len(q), wide))
            with jax.named_scope(KEY_BLOCKS):
                total, highest, norm = lax.fori_loop(0, row.num_keys[i], add, start)
            real = jnp.tile(_block(row.group, i) > 0, len(q) // BLOCK)
            norm = jnp.where(real, norm, 1)
            # Padding gets weights exp(score - inf) = 0 in the backward pass.
            log_sum = jnp.where(real, highest + jnp.log(norm), jnp.inf)
            return None, (jnp.where(real[:, None], total / norm[:, None], 0).astype(q.dtype), log_sum)

        return None, lax.scan(one_block, None, (queries, first // BLOCK + jnp.arange(len(queries))))[1]

    rows = jnp.arange(len(queries)) // kv_heads
    _, (out, log_sum) = lax.scan(one_head, None, (queries, _rows_of(k), _rows_of(v), rows))
    out = checkpoint_name(_joined(out, q.shape[2]), "attention")
    return out, (q, k, v, blocks, first, out, checkpoint_name(log_sum, "attention"))


def _backward(kept: tuple, grad: jax.Array) -> tuple:
    """Gradients by q, k and v."""
    q, k, v, blocks, first, out, log_sum = kept
    wide, kv_heads = wide_dtype(q.dtype), k.shape[2]
    scale = q.shape[-1] ** -0.5
    inner = (grad.astype(wide) * out.astype(wide)).sum(axis=-1, keepdims=True)  # [rows, length, heads, 1]
    per_query = (_by_head(q * scale, kv_heads), _by_head(grad, kv_heads), _by_head(inner, kv_heads), log_sum)

    def one_head(_: None, inputs: tuple) -> tuple[None, tuple]:
        per_query, keys, values, row = inputs
        row = jax.tree.map(lambda x: x[row], blocks)

        def one_block(of_keys: tuple, inputs: tuple) -> tuple[tuple, jax.Array]:
            (q, grad, inner, log_sum), i = inputs

            def add(n: jax.Array, sums: tuple) -> tuple:
                grad_q, grad_k, grad_v = sums
                j = row.keys[i, n]
                key, value = _block(keys, j), _block(values, j)
                weights = jnp.exp(_scores(q, key, row, i, j) - log_sum[:, None])
                by_scores = (weights * (multiply(grad, value, (1, 1)) - inner)).astype(
                    q.dtype
                )  # [shared * BLOCK, BLOCK]
                return (
                    grad_q + multiply(by_scores, key),
                    _add_block(grad_k, multiply_transposed(by_scores, q, q.dtype), j),
                    _add_block(grad_v, multiply_transposed(weights, grad, grad.dtype), j),
                )

            with jax.named_scope(KEY_BLOCKS):
                grad_q, *of_keys = lax.fori_loop(0, row.num_keys[i], add, (jnp.zeros(q.shape, wide), *of_keys))
            return tuple(of_keys), (grad_q * scale).astype(q.dtype)

        nothing = (jnp.zeros(keys.shape, wide), jnp.zeros(values.shape, wide))
        index = first // BLOCK + jnp.arange(len(per_query[0]))
        (grad_k, grad_v), grad_q = lax.scan(one_block, nothing, (per_query, index))
        return None, (grad_q, grad_k.astype(k.dtype), grad_v.astype(v.dtype))

    rows = jnp.arange(len(log_sum)) // kv_heads
    _, (grad_q, grad_k, grad_v) = lax.scan(one_head, None, (per_query, _rows_of(k), _rows_of(v), rows))
    grad_k, grad_v = (x.reshape(len(q), kv_heads, *x.shape[1:]).swapaxes(1, 2) for x in (grad_k, grad_v))
    return _joined(grad_q, q.shape[2]), grad_k, grad_v, None, None


_attend.defvjp(_forward, _backward)


def _scores(q: jax.Array, key: jax.Array, row: Blocks, i: jax.Array, j: jax.Array) -> jax.Array:
    """Scores of block `i` of queries and block `j` of keys: `[shared * BLOCK, BLOCK]`, very low where unseen."""
    of_query, of_key = (tuple(_block(x, at) for x in row[:3]) for at in (i, j))
    index = jnp.arange(BLOCK)
    seen = (of_query[1][:, None] == of_key[1][None]) & (index[:, None] + i * BLOCK >= index[None] + j * BLOCK)
    seen &= (of_key[2] == 0)[None] | (of_query[2][:, None] == of_key[2][None])
    if row.window is not None:
        seen &= of_query[0][:, None] - of_key[0][None] < row.window
    scores = multiply(q, key, (1, 1)).reshape(-1, BLOCK, BLOCK)
    return jnp.where(seen[None], scores, _unseen(scores.dtype)).reshape(-1, BLOCK)


def _unseen(dtype: jnp.dtype) -> jax.Array:
    # Finite, so that queries that see no key of a block have no inf - inf; one that they see later takes all weight.
    return jnp.asarray(jnp.finfo(dtype).min / 2, dtype)


def _block(x: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * BLOCK, BLOCK)


def _add_block(x: jax.Array, more: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, _block(x, i) + more, i * BLOCK, axis=0)


def _rows_of(x: jax.Array) -> jax.Array:
    """`[rows, length, kv_heads, head_dim]` -> `[rows * kv_heads, length, head_dim]`."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _by_head(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[rows, length, heads, n]` -> `[rows * kv_heads, blocks, heads / kv_heads * BLOCK, n]`."""
    rows, length, heads, size = x.shape
    x = x.reshape(rows, length // BLOCK, BLOCK, kv_heads, heads // kv_heads, size).transpose(0, 3, 1, 4, 2, 5)
    return x.reshape(rows * kv_heads, length // BLOCK, -1, size)


def _joined(x: jax.Array, heads: int) -> jax.Array:
    """The inverse of `_by_head`."""
    pairs, blocks, width, size = x.shape
    shared = width // BLOCK
    kv_heads = heads // shared
    x = x.reshape(pairs // kv_heads, kv_heads, blocks, shared, BLOCK, size).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(pairs // kv_heads, blocks * BLOCK, heads, size)
