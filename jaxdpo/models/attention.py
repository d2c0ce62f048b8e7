"""Attention over packed preference trees, in dense form.

`tree_mask` is the one definition of who sees whom; `attention` is softmax attention under any mask, with grouped
key/value heads. A query that sees no key (padding) returns zero, never NaN.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxdpo.models.matmul import full_precision

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Attention over given rows: `(q [rows, length, heads, head_dim], k [rows, length, kv_heads, head_dim], v) -> as q`."""


class AttentionForm(NamedTuple):
    """One way to compute attention over packed preference trees; every form gives what the dense one gives."""

    prepare: Callable[..., Any]
    """`(positions, group, candidate, *, window) -> prepared`, once for all layers; arguments as of `tree_mask`."""
    attend: Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
    """`(q, k, v, prepared) -> out`, as `attention` under the mask of `tree_mask`; zero at padding."""


def tree_mask(positions: jax.Array, group: jax.Array, candidate: jax.Array, *, window: int | None = None) -> jax.Array:
    """Which keys each query sees: its own group's prompt and its own candidate, up to itself.

    Query q sees key k iff they are of the same group (not padding), k stands at or before q in the row, and
    `candidate[k]` is 0 (the shared prompt) or q's own.

    Args:
      positions: int `[rows, length]` position in the path.
      group: int `[rows, length]` 0 for padding, which sees nothing and is seen by nothing.
      candidate: int `[rows, length]` 0 for the prompt.
      window: sliding window; a key must also satisfy `positions[q] - positions[k] < window`.
    Returns:
      bool `[rows, length, length]`: `[row, query, key]`.
    Example:
      >>> one = jnp.ones((1, 4), int)
      >>> tree_mask(jnp.array([[0, 1, 2, 2]]), one, jnp.array([[0, 0, 1, 2]])).astype(int)
      Array([[[1, 0, 0, 0],
              [1, 1, 0, 0],
              [1, 1, 1, 0],
              [1, 1, 0, 1]]], dtype=int32)
    """
    length = group.shape[-1]
    query = (slice(None), slice(None), None)  # [rows, length, 1]
    key = (slice(None), None, slice(None))  # [rows, 1, length]
    same_group = (group[query] == group[key]) & (group[query] != 0)
    on_path = (candidate[key] == 0) | (candidate[key] == candidate[query])
    mask = same_group & on_path & jnp.tril(jnp.ones((1, length, length), bool))  # [rows, length, length]
    if window is not None:
        mask &= positions[query] - positions[key] < window
    return mask


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Scaled dot-product attention; every key/value head serves `heads // kv_heads` query heads.

    Logits and softmax are at least float32: a bfloat16 logit near 64 is off by up to 0.25.

    Args:
      q: `[rows, length, heads, head_dim]`.
      k: `[rows, length, kv_heads, head_dim]`.
      v: as `k`.
      mask: bool `[rows, length, length]`, `[row, query, key]`.
    Returns:
      `[rows, length, heads, head_dim]`, dtype of `q`; zero where a query sees no key.
    References:
      Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, Eq. 1; Ainslie et al. 2023,
      https://arxiv.org/abs/2305.13245 (grouped heads).
    """
    rows, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    precision = full_precision(q.dtype)
    q = q.reshape(rows, length, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    logits = jnp.einsum("rqngh,rknh->rngqk", q, k, preferred_element_type=wide, precision=precision)
    seen = mask[:, None, None]  # [rows, 1, 1, query, key]
    # Finite, so that a row without keys has no inf - inf; the second `where` then empties that row.
    logits = jnp.where(seen, logits, jnp.finfo(wide).min / 2)
    weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0).astype(v.dtype)
    out = jnp.einsum("rngqk,rknh->rqngh", weights, v, precision=precision)
    return checkpoint_name(out.reshape(rows, length, heads, head_dim), "attention")


def cached_attention(
    q: jax.Array,
    prompt: tuple[jax.Array, jax.Array],
    own: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    step: jax.Array,
    *,
    window: int | None = None,
) -> jax.Array:
    """Attention of one more token of every sample, to its prompt and to the sample so far.

    The queries of a prompt's samples read its keys together.

    Args:
      q: `[prompts, samples, heads, head_dim]`.
      prompt: keys `[prompts, kv_heads, head_dim, length]`, and values with the last two axes exchanged.
      own: keys `[prompts * samples, kv_heads, head_dim, capacity]`, and values with the last two axes exchanged.
      lengths: int `[prompts]`: how many keys of the prompt there are.
      step: int, the index of the token in its sample; it sees those up to itself.
      window: sliding window, in tokens up to and including the query.
    Returns:
      As `q`.
    """
    prompts, samples, heads, head_dim = q.shape
    kv_heads, _, length = prompt[0].shape[1:]
    capacity, grouped = own[0].shape[3], heads // kv_heads
    wide = jnp.promote_types(q.dtype, jnp.float32)
    product = functools.partial(jnp.matmul, precision=full_precision(q.dtype), preferred_element_type=wide)
    of_row, of_prompt = (prompts * samples, kv_heads, grouped), (prompts, kv_heads, samples * grouped)

    def together(
        x: jax.Array,
    ) -> jax.Array:  # [rows, kv_heads, grouped, n] -> [*of_prompt, n]
        return x.reshape(prompts, samples, kv_heads, grouped, -1).swapaxes(1, 2).reshape(*of_prompt, -1)

    def apart(x: jax.Array) -> jax.Array:  # and back
        return x.reshape(prompts, kv_heads, samples, grouped, -1).swapaxes(1, 2).reshape(*of_row, -1)

    q = (q * head_dim**-0.5).reshape(*of_row, head_dim)
    logits = jnp.concatenate([apart(product(together(q), prompt[0])), product(q, own[0])], axis=-1)
    before = jnp.arange(length)[None] < lengths[:, None]  # [prompts, length]
    after = jnp.broadcast_to(jnp.arange(capacity)[None] <= step, (prompts, capacity))
    if window is not None:
        before &= jnp.arange(length)[None] > (lengths + step)[:, None] - window
        after &= jnp.arange(capacity)[None] > step - window
    seen = jnp.repeat(jnp.concatenate([before, after], axis=1), samples, axis=0)[:, None, None]
    logits = jnp.where(seen, logits, jnp.finfo(wide).min / 2)  # [rows, kv_heads, grouped, length + capacity]
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    out = apart(product(together(weights[..., :length]), prompt[1])) + product(weights[..., length:], own[1])
    return out.astype(q.dtype).reshape(prompts, samples, heads, head_dim)
