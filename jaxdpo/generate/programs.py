"""What is compiled to draw completions: prompts are read, first tokens are drawn, and steps are done many at a time.

Rows are the samples of all prompts of a batch, `prompts * samples`, those of the first prompt first. A program exists
for each padded length of prompts and each capacity of samples; nothing else in a call compiles one.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxdpo.generate.warp import Options, choose
from jaxdpo.models import Decoder
from jaxdpo.models.decoding import (
    DecodingParams,
    KeysValues,
    PromptCache,
    decode_step,
    decoding_params,
    empty_cache,
    prefill,
)
from jaxdpo.sharding import constrain


class Samples(NamedTuple):
    """Samples while they are drawn."""

    tokens: jax.Array
    """int32 `[rows, capacity]`."""
    logps: jax.Array
    """`[rows, capacity]`: log-probs under the model at temperature 1 without filters, nats, at least float32."""
    lengths: jax.Array
    """int32 `[rows]`: tokens of each sample so far, a stop token included."""
    done: jax.Array
    """bool `[rows]`: which have ended."""
    keys: jax.Array
    """`[rows]` random keys."""
    step: jax.Array
    """int32: tokens of a sample that has not ended."""
    cache: KeysValues
    """Of the tokens but the last one."""


class Programs(NamedTuple):
    """The compiled functions of a decoder."""

    prepare: Callable[[dict], DecodingParams]
    """`decoding_params`."""
    read: Callable[..., tuple[jax.Array, PromptCache]]
    """`(params, tokens, lengths)`: `prefill`."""
    start: Callable[..., Samples]
    """`(logits, seed, digests, first, done, options, stops, capacity)`: see `_start`."""
    advance: Callable[..., Samples]
    """`(params, prompt, samples, until, options, stops)`: see `_advance`."""
    grow: Callable[..., Samples]
    """`(samples, capacity)`: the same samples with more room."""


@functools.lru_cache(maxsize=8)
def make_programs(decoder: Decoder) -> Programs:
    """The programs of a decoder; the same at every call, so that nothing is compiled twice."""
    return Programs(
        prepare=jax.jit(functools.partial(decoding_params, decoder)),
        read=jax.jit(functools.partial(prefill, decoder)),
        start=jax.jit(functools.partial(_start, decoder), static_argnames="capacity"),
        advance=jax.jit(functools.partial(_advance, decoder), donate_argnums=2),
        grow=jax.jit(_grow, static_argnames="capacity"),
    )


def _start(
    decoder: Decoder,
    logits: jax.Array,
    seed: jax.Array,
    digests: jax.Array,
    first: jax.Array,
    done: jax.Array,
    options: Options,
    stops: jax.Array,
    *,
    capacity: int,
) -> Samples:
    """The first tokens.

    Args:
      decoder: the model.
      logits: `[prompts, vocab]`, from `prefill`.
      seed: uint32.
      digests: uint32 `[prompts, 2]`, of each prompt's content.
      first: the number of a prompt's first sample here.
      done: bool `[prompts, samples]`: rows that are none.
      options: see `warp`.
      stops: int32 `[n]`: tokens that end a sample.
      capacity: tokens that there is room for.
    """
    prompts, samples = done.shape
    rows = prompts * samples

    def key(digest: jax.Array, sample: jax.Array) -> jax.Array:
        key = jax.random.key(seed)
        for part in (digest[0], digest[1], sample):
            key = jax.random.fold_in(key, part)
        return key

    numbers = (first + jnp.arange(samples)).astype(jnp.uint32)
    keys = jax.vmap(lambda digest: jax.vmap(lambda sample: key(digest, sample))(numbers))(digests).reshape(rows)
    wide = constrain(jnp.repeat(logits, samples, axis=0), "batch", "vocab")  # [rows, vocab]
    empty = Samples(
        tokens=constrain(jnp.zeros((rows, capacity), jnp.int32), "batch", None),
        logps=constrain(jnp.zeros((rows, capacity), logits.dtype), "batch", None),
        lengths=jnp.zeros(rows, jnp.int32),
        done=done.reshape(rows),
        keys=keys,
        step=jnp.zeros((), jnp.int32),
        cache=empty_cache(decoder, rows, capacity),
    )
    return _append(empty, *choose(wide, keys, 0, options), stops)


def _advance(
    decoder: Decoder,
    params: DecodingParams,
    prompt: PromptCache,
    samples: Samples,
    until: jax.Array,
    options: Options,
    stops: jax.Array,
) -> Samples:
    """Draws tokens until there are `until` of each sample, or all have ended."""
    prompts = len(prompt.lengths)

    def go_on(samples: Samples) -> jax.Array:
        return (samples.step < until) & ~samples.done.all()

    def draw(samples: Samples) -> Samples:
        last = jax.lax.dynamic_slice_in_dim(samples.tokens, samples.step - 1, 1, axis=1).reshape(prompts, -1)
        logits, cache = decode_step(decoder, params, prompt, samples.cache, last, samples.step - 1)
        logits = constrain(logits.reshape(last.size, -1), "batch", "vocab")
        chosen = choose(logits, samples.keys, samples.step, options)
        return _append(samples._replace(cache=cache), *chosen, stops)

    return jax.lax.while_loop(go_on, draw, samples)


def _append(samples: Samples, tokens: jax.Array, logps: jax.Array, stops: jax.Array) -> Samples:
    """The samples with one more token each; those that have ended keep their length."""

    def put(x: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, column[:, None].astype(x.dtype), samples.step, axis=1)

    ended = (tokens[:, None] == stops[None]).any(axis=1)
    return samples._replace(
        tokens=put(samples.tokens, tokens),
        logps=put(samples.logps, logps),
        lengths=samples.lengths + ~samples.done,
        done=samples.done | ended,
        step=samples.step + 1,
    )


def _grow(samples: Samples, *, capacity: int) -> Samples:
    more = capacity - samples.tokens.shape[1]

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, more if axis == i else 0) for i in range(x.ndim)])

    cache = tuple((pad(keys, 3), pad(values, 2)) for keys, values in samples.cache)
    return samples._replace(tokens=pad(samples.tokens, 1), logps=pad(samples.logps, 1), cache=cache)
