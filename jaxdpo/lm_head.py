"""The LM head over lists of states, by blocks of the vocabulary: log-probs, statistics, and their gradients.

Logits of a block exist for a chunk of states at a time. They are computed once forward, where the log-sum-exp and all
else is added up block by block, and once more backward. Sums are at least float32.
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxdpo.models.matmul import multiply, multiply_transposed, wide_dtype
from jaxdpo.sharding import constrain, vocab_apart

SLOT_CHUNK = 1024
"""Slots of each device that pass the LM head at once, at most."""
CHUNKS = "head_chunks"
"""What the loops over chunks are called in a compiled program: how often they go round is known when it runs."""
VOCAB_BLOCK = 2048
"""Tokens of the vocabulary, on each of the devices that share it, whose logits are computed at once: 1024 * 2048
logits are 8 MiB, which stay in the cache of a CPU."""


class Scan(NamedTuple):
    """What the logits of a slot have added up to; `[...]` each."""

    highest: jax.Array
    """Of the logits so far, or a number below all of them."""
    norm: jax.Array
    """The sum of `exp(logit - highest)`."""
    picked: jax.Array
    """The logit of the target, 0 until it is met."""
    sums: Mapping[str, jax.Array]
    """By statistic, the sum of `Statistic.term`."""

    @property
    def log_z(self) -> jax.Array:
        """Log-sum-exp of all logits."""
        return self.highest + jnp.log(self.norm)


class Statistic(NamedTuple):
    """A number that a slot's prediction tells besides the log-prob of its target."""

    power: int
    """The power of `exp(logit - highest)` that `term` is proportional to."""
    term: Callable[[jax.Array, jax.Array], jax.Array]
    """`(exp(logit - highest), logit)` -> what is added up over the vocabulary."""
    value: Callable[[jax.Array, Scan], jax.Array]
    """`(the sum, the whole scan)` -> the number."""


STATISTICS: dict[str, Statistic] = {
    "log_sum_sq_probs": Statistic(
        2, lambda weight, logit: weight * weight, lambda total, scan: jnp.log(total) - 2 * jnp.log(scan.norm)
    ),
    "entropy": Statistic(1, lambda weight, logit: weight * logit, lambda total, scan: scan.log_z - total / scan.norm),
    "correct": Statistic(
        0, lambda weight, logit: jnp.zeros_like(weight), lambda total, scan: (scan.picked >= scan.highest) + total
    ),
}
"""What a slot can tell besides its log-prob.

`log_sum_sq_probs` is the log of the sum of squared probabilities over the vocabulary, nats, which WPO weighs by;
`entropy` is that of the prediction, nats; `correct` is 1 where no token is likelier than the target, else 0.
"""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_logps(
    dtype: jnp.dtype,
    statistics: tuple[str, ...],
    head: jax.Array,
    states: jax.Array,
    target: jax.Array,
    used: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Log-probs and statistics of chunks of slots.

    On a mesh the head is gathered once in each pass, in `dtype`; every device sums up the gradient of its own part,
    which is reduced once.

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
    return _forward(dtype, statistics, head, states, target, used)[0]


class _Blocks(NamedTuple):
    """The vocabulary, cut into blocks that overlap where their width does not divide it."""

    head: jax.Array
    """`[apart, vocab / apart, embed]`: what each device has that shares the vocabulary."""
    width: int

    @property
    def number(self) -> int:
        return -(-self.head.shape[1] // self.width)

    def start(self, i: jax.Array) -> jax.Array:
        return jnp.minimum(i * self.width, self.head.shape[1] - self.width)

    def kernel(self, i: jax.Array) -> jax.Array:
        """`[apart, width, embed]` of a block."""
        return lax.dynamic_slice_in_dim(self.head, self.start(i), self.width, axis=1)

    def logits(self, i: jax.Array, states: jax.Array) -> jax.Array:
        """`[parts, slots, apart, width]` of a block, at least float32; factors as the head is."""
        kernel = self.kernel(i)
        flat = multiply(states.reshape(-1, states.shape[-1]), kernel.reshape(-1, kernel.shape[-1]), (1, 1))
        flat = flat.astype(wide_dtype(flat.dtype)).reshape(*states.shape[:2], *kernel.shape[:2])
        return constrain(flat, "slots", None, "vocab", None)

    def fresh(self, i: jax.Array) -> jax.Array | None:
        """bool `[1, 1, 1, width]`: what no block before has; None where that is everything."""
        if self.head.shape[1] % self.width == 0:
            return None
        return (self.start(i) + jnp.arange(self.width) >= i * self.width)[None, None, None]

    def is_target(self, i: jax.Array, target: jax.Array) -> jax.Array:
        """bool `[parts, slots, apart, width]`."""
        apart, size, _ = self.head.shape
        ids = jnp.arange(apart)[:, None] * size + (self.start(i) + jnp.arange(self.width))[None]  # [apart, width]
        hit, fresh = ids[None, None] == target[..., None, None], self.fresh(i)
        return hit if fresh is None else hit & fresh


def _blocks(head: jax.Array, dtype: jnp.dtype) -> _Blocks:
    head = constrain(head.astype(dtype), "vocab", None)
    apart = vocab_apart()
    head = constrain(head.reshape(apart, -1, head.shape[1]), "vocab", None, None)
    return _Blocks(head, min(VOCAB_BLOCK, head.shape[1]))


def _forward(
    dtype: jnp.dtype,
    statistics: tuple[str, ...],
    head: jax.Array,
    states: jax.Array,
    target: jax.Array,
    used: jax.Array,
) -> tuple:
    blocks, wide = _blocks(head, dtype), wide_dtype(states.dtype)
    shape = (*target.shape[1:], len(blocks.head))  # [parts, width, apart]
    lowest = jnp.finfo(wide).min / 2

    def add(c: jax.Array, done: tuple) -> tuple:
        chunk = states[c].astype(dtype)

        def add_block(i: jax.Array, scan: Scan) -> Scan:
            logits, fresh = blocks.logits(i, chunk), blocks.fresh(i)
            picked = scan.picked + jnp.where(blocks.is_target(i, target[c]), logits, 0).sum(axis=-1)
            if fresh is not None:
                logits = jnp.where(fresh, logits, lowest)
            highest = jnp.maximum(scan.highest, logits.max(axis=-1))
            weights = jnp.exp(logits - highest[..., None])
            decay = jnp.exp(scan.highest - highest)
            sums = {
                name: scan.sums[name] * decay**kind.power + kind.term(weights, logits).sum(axis=-1)
                for name, kind in chosen.items()
            }
            return Scan(highest, scan.norm * decay + weights.sum(axis=-1), picked, sums)

        zeros = constrain(jnp.zeros(shape, wide), "slots", None, "vocab")
        start = Scan(jnp.full_like(zeros, lowest), zeros, zeros, dict.fromkeys(chosen, zeros))
        scan = _joined(lax.fori_loop(0, blocks.number, add_block, start), chosen)
        found = {name: kind.value(scan.sums[name], scan) for name, kind in chosen.items()}
        return jax.tree.map(lambda x, y: x.at[c].set(y), done, (scan.picked - scan.log_z, scan.log_z, found))

    chosen = {name: STATISTICS[name] for name in statistics}
    zeros = jnp.zeros(target.shape, wide)
    with jax.named_scope(CHUNKS):
        logps, log_z, found = lax.fori_loop(0, used, add, (zeros, zeros, dict.fromkeys(statistics, zeros)))
    return (logps, found), (head, states, target, used, log_z)


def _joined(scan: Scan, chosen: Mapping[str, Statistic]) -> Scan:
    """Of scans `[..., apart]` over parts of the vocabulary that over all of it, `[...]`."""
    highest = scan.highest.max(axis=-1)
    scale = jnp.exp(scan.highest - highest[..., None])
    sums = {name: (scan.sums[name] * scale**kind.power).sum(axis=-1) for name, kind in chosen.items()}
    return Scan(highest, (scan.norm * scale).sum(axis=-1), scan.picked.sum(axis=-1), sums)


def _backward(dtype: jnp.dtype, statistics: tuple[str, ...], kept: tuple, grads: tuple) -> tuple:
    del statistics
    head, states, target, used, log_z = kept
    blocks, wide = _blocks(head, dtype), wide_dtype(head.dtype)
    apart, size, embed = blocks.head.shape
    parts, width = target.shape[1:]
    of_part = jax.vmap(lambda x, y: multiply_transposed(x, y, dtype))
    of_share = jax.vmap(multiply, in_axes=(1, 0))

    def add(c: jax.Array, done: tuple) -> tuple:
        of_head, of_states = done
        chunk = states[c].astype(dtype)

        def add_block(i: jax.Array, sums: tuple) -> tuple:
            of_head, of_chunk = sums
            probs = jnp.exp(blocks.logits(i, chunk) - log_z[c][..., None, None])
            if (fresh := blocks.fresh(i)) is not None:
                probs = jnp.where(fresh, probs, 0)
            of_logits = grads[0][c][..., None, None] * (blocks.is_target(i, target[c]) - probs)
            of_logits = constrain(of_logits.astype(dtype), "slots", None, "vocab", None)
            more = of_share(of_logits.reshape(-1, apart, blocks.width), blocks.kernel(i))  # [apart, slots, embed]
            flat = of_logits.reshape(parts, width, -1)
            of_kernel = of_part(flat, chunk).reshape(parts, apart, blocks.width, embed)
            before = lax.dynamic_slice_in_dim(of_head, blocks.start(i), blocks.width, axis=2)
            of_head = lax.dynamic_update_slice_in_dim(of_head, before + of_kernel, blocks.start(i), axis=2)
            return of_head, of_chunk + more

        nothing = constrain(jnp.zeros((apart, parts * width, embed), wide), "vocab", "slots", None)
        of_head, of_chunk = lax.fori_loop(0, blocks.number, add_block, (of_head, nothing))
        of_chunk = of_chunk.sum(axis=0).reshape(parts, width, embed).astype(states.dtype)
        return of_head, of_states.at[c].set(of_chunk)

    nothing = constrain(jnp.zeros((parts, apart, size, embed), wide), "slots", "vocab", None, None)
    with jax.named_scope(CHUNKS):
        of_head, of_states = lax.fori_loop(0, used, add, (nothing, jnp.zeros_like(states)))
    of_head = of_head.sum(axis=0).reshape(head.shape).astype(head.dtype)
    return constrain(of_head, "vocab", "embed"), of_states, None, None


head_logps.defvjp(_forward, _backward)
