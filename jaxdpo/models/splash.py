"""Attention over packed preference trees by splash, the block-sparse flash attention for TPUs that JAX brings.

Splash compares one segment id of a query with one of a key, lets a function of one integer of the query and the index
of the key refuse more, and skips whole blocks by a table. A tree fits in that, without a copy of a prompt for each
candidate. The keys of a row stand twice, which makes two halves:

  prompt half   keys of prompts; a query sees those of its group that stand at or before it
  own half      keys of completions; a query sees those from its completion's first token to itself

Group is the segment id; the query's index and its completion's first index are the integer. So memory is linear in the
length, and a block is read and multiplied only if one of its queries sees one of its keys, which depends on the row's
groups and not on causality alone. For a row of length L with groups of n tokens and blocks of b:

  pairs of a query and a key that are multiplied    L * about (n + b), where dense attention has L * L
  keys and values held by a layer                   2 * L, where a copy for each of K candidates has up to (1 + K) * L
  masks                                             2 integers a token and 2 * (L / b)**2 bytes, where dense has L * L
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask_info

from jaxdpo.models.attention import full_precision
from jaxdpo.sharding import lengths_apart, map_heads
from jaxdpo.types import InputError

LANES = 128
"""Blocks are multiples of it."""
LARGEST_BLOCK = 512
"""Smaller blocks skip more, but each step of the kernel's grid takes time of its own, a skipped one too."""
LONGEST_ROW = 1 << 15
"""Two indices share an int32."""

MaskInfo = splash_attention_mask_info.MaskInfo


class SplashMask(NamedTuple):
    """Who sees whom as splash wants it; first axis rows, rows padded to whole blocks. What is told of queries has a
    second axis, the devices that share a row's length; one device's own part is without it."""

    forward: MaskInfo
    """For each block of queries the blocks of keys to visit; the gradient of the queries takes the same."""
    keys: MaskInfo
    """The same table for the gradients of keys and values, which visit blocks of queries."""
    queries: jax.Array
    """int `[rows, devices, padded / devices]` group of each query."""
    sources: jax.Array
    """int `[rows, 2 * padded]` group of each key, in both halves."""
    real: jax.Array
    """bool `[rows, length]`: not padding."""


def splash_mask(
    positions: jax.Array, group: jax.Array, candidate: jax.Array, *, window: int | None = None
) -> SplashMask:
    """`attention.tree_mask`, whose arguments these are, for splash.

    Raises:
      InputError: for a sliding window shorter than the row, for rows of more than 32768, and for those that devices
        do not share in whole blocks.
    """
    length = group.shape[-1]
    if window is not None and window < length:
        raise InputError(
            f"attention 'splash' got a sliding window of {window} in rows of {length}; allowed: none, or one as long "
            f"as the row; use 'dense' or 'blockwise'"
        )
    if length > LONGEST_ROW:
        raise InputError(f"attention 'splash' got rows of {length}; allowed: up to {LONGEST_ROW}; use shorter rows")
    apart = lengths_apart()
    if apart > 1 and length % (apart * LANES):
        raise InputError(
            f"attention 'splash' got rows of {length} over a context axis of {apart} devices; allowed: multiples of "
            f"{apart * LANES}; use such --row-lengths"
        )
    block = _block(length)
    group, candidate = (jnp.pad(x, ((0, 0), (0, -length % block))) for x in (group, candidate))
    in_prompt = (candidate == 0) & (group != 0)
    halves = [jnp.where(in_prompt, group, -1), jnp.where(in_prompt, -1, group)]
    sources = jnp.concatenate(halves, axis=1)  # [rows, 2 * padded]

    # A softmax over nothing is 0 / 0, in the backward pass too: padding sees itself, as every other token does anyway.
    index = jnp.broadcast_to(jnp.arange(group.shape[1])[None], group.shape)
    begins = (jnp.diff(group, prepend=0) != 0) | (jnp.diff(candidate, prepend=0) != 0) | (group == 0)
    first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    visited = _visited(group, in_prompt, first, block)

    def table(process: Callable[..., tuple[Any, None]]) -> MaskInfo:
        def of_row(visited: jax.Array, indices: jax.Array) -> MaskInfo:
            # As a mask of blocks of one by one: what is not visited is empty, what is visited is masked in the kernel.
            info, _ = process(visited[None], (1, 1))
            return info._replace(mask_next=None, partial_mask_blocks=None, q_sequence=indices, is_dynamic_mask=None)

        return jax.vmap(jax.vmap(of_row))(by_device(visited), by_device(index << 16 | first))

    def by_device(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), apart, -1, *x.shape[2:])

    forward = table(splash_attention_mask_info.process_dynamic_mask)
    keys = table(splash_attention_mask_info.process_dynamic_mask_dkv)
    return SplashMask(forward, keys, by_device(group), sources, group[:, :length] != 0)


def _visited(group: jax.Array, in_prompt: jax.Array, first: jax.Array, block: int) -> jax.Array:
    """Which blocks of keys can matter to a block of queries; groups and completions are contiguous in a row.

    Args:
      group: int `[rows, padded]`.
      in_prompt: bool, same shape.
      first: int, same shape: index of the first token of a token's prompt or completion.
      block: tokens of a block.
    Returns:
      bool `[rows, blocks, 2 * blocks]`: `[row, query block, key block]`, the prompt half before the own half.
    """
    rows, padded = group.shape
    blocks = padded // block
    earlier = jnp.tril(jnp.ones((1, blocks, blocks), bool))
    number = jnp.cumsum(jnp.diff(group, prepend=0) != 0, axis=1)  # of the group, in the order of the row
    lowest = jnp.where(in_prompt, number, padded + 1).reshape(rows, blocks, block).min(axis=-1)
    highest = jnp.where(in_prompt, number, -1).reshape(rows, blocks, block).max(axis=-1)
    of_queries = number.reshape(rows, blocks, block)
    prompt = (lowest[:, None] <= of_queries[:, :, -1:]) & (highest[:, None] >= of_queries[:, :, :1])
    last = jnp.arange(block - 1, padded, block)
    own = last[None, None] >= first[:, ::block, None]
    return jnp.concatenate([prompt & earlier, own & earlier], axis=-1)


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask) -> jax.Array:
    """`attention.attention` by splash: compiled for TPUs, interpreted (slow, for tests) elsewhere.

    On a mesh every device computes its own queries and heads.

    Args:
      q: `[rows, length, heads, head_dim]`.
      k: `[rows, length, kv_heads, head_dim]`.
      v: as `k`.
      mask: from `splash_mask`.
    Returns:
      `[rows, length, heads, head_dim]`, dtype of `q`; zero at padding.
    """
    return map_heads(_attend)(q, k, v, mask)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask, first: jax.Array) -> jax.Array:
    """`splash_attention` on one device, whose queries begin at `first`."""
    length, block = q.shape[1], _block(k.shape[1])
    device = first // length
    forward, keys, queries = jax.tree.map(lambda x: x[:, device], (mask.forward, mask.keys, mask.queries))
    real = jax.lax.dynamic_slice_in_dim(mask.real, first, length, axis=1)
    mask = SplashMask(forward, keys, queries, mask.sources, real)

    def by_head(x: jax.Array) -> jax.Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, -length % block), (0, 0)))  # [rows, heads, padded, size]

    def twice(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x, x], axis=2)

    q = q * q.shape[-1] ** -0.5  # the kernel does not scale
    out = _exact(by_head(q), twice(by_head(k)), twice(by_head(v)), mask)
    out = jnp.where(real[..., None, None], out[:, :, :length].swapaxes(1, 2), 0)
    return checkpoint_name(out, "attention")


@jax.custom_vjp
def _exact(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask) -> jax.Array:
    """`_by_platform` whose products of float32 are float32 products, in the backward pass too.

    The kernels leave the precision to jax's configuration, which by then is the caller's: so both passes set it.
    """
    with jax.default_matmul_precision(_precision(q)):
        return _by_platform(q, k, v, mask)


def _exact_forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask) -> tuple[jax.Array, Callable]:
    with jax.default_matmul_precision(_precision(q)):
        return jax.vjp(functools.partial(_by_platform, mask=mask), q, k, v)


def _exact_backward(pull: Callable, cotangent: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    with jax.default_matmul_precision(_precision(cotangent)):
        return *pull(cotangent), None


_exact.defvjp(_exact_forward, _exact_backward)


def _by_platform(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask) -> jax.Array:
    """The kernel over rows, `[rows, heads, tokens, head_dim]`, for the platform that the program is lowered for."""
    # Not `jax.default_backend()`: programs for a TPU can be compiled on a machine without one.
    tpu, default = (functools.partial(_rows, interpret=interpret) for interpret in (False, True))
    return jax.lax.platform_dependent(q, k, v, mask, tpu=tpu, default=default)


def _rows(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask, *, interpret: bool) -> jax.Array:
    """The kernel over rows, one by one: a table of blocks is the whole kernel's."""
    padded = k.shape[2] // 2
    block = _block(padded)
    sizes = kernels.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )

    def row(q: jax.Array, k: jax.Array, v: jax.Array, mask: SplashMask) -> Any:
        kernel = splash_attention_kernel.SplashAttentionKernel(
            mask.forward,
            mask.forward,
            mask.keys,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=_in_reach(padded),
            interpret=interpret,
        )
        return kernel(q, k, v, kernels.SegmentIds(mask.queries, mask.sources))

    return jax.vmap(row)(q, k, v, mask)


@functools.cache
def _in_reach(padded: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The part of the mask that is a function of indices: at or before the query, and of its completion if of any."""

    def in_reach(query: jax.Array, key: jax.Array) -> jax.Array:
        index, first = query >> 16, query & 0xFFFF
        return (key <= index) | ((key - padded >= first) & (key - padded <= index))

    return in_reach


def _precision(x: jax.Array) -> str | None:
    return "highest" if full_precision(x.dtype) else None


def _block(length: int) -> int:
    """Tokens of a block: what a device has of a row, to the next multiple of 128, or 512 if that is less.

    Where devices share rows, as much of 512 as divides what they have.
    """
    apart = lengths_apart()
    if apart > 1:
        return LANES * math.gcd(length // apart // LANES, LARGEST_BLOCK // LANES)
    return min(-(-length // LANES) * LANES, LARGEST_BLOCK)
