"""What a training step holds on a device, estimated before anything is compiled, and what a layer keeps by that."""

import dataclasses
import math
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import optax

from jaxdpo.config import RunConfig
from jaxdpo.data.packing import Layout
from jaxdpo.lm_head import SLOT_CHUNK, VOCAB_BLOCK
from jaxdpo.models import Decoder
from jaxdpo.processes import gathered
from jaxdpo.sharding import batch_size_multiple, tokens_apart
from jaxdpo.types import RunStopped

CHOSEN = ("projections", "attention", "full")
"""What is chosen from, the fastest first; `none` keeps more than twice what `projections` does and saves no product."""
USABLE = {"cpu": 0.5}
USABLE_ELSEWHERE = 0.85
"""Share of a device's memory that an estimate may reach, by platform: a host's is shared with other programs."""


def activation_bytes(decoder: Decoder, *, rows: int, length: int, slots: int, apart: int = 1) -> int:
    """What a forward and backward pass over packed rows on one device holds besides parameters and gradients.

    It counts what each layer keeps by `decoder.remat`, and the arrays of the one layer that is under way or, if they
    take more, the logits of one block of the LM head. A device has a part of each of its rows where `apart` of them
    share their length.
    """
    config, tokens = decoder.config, rows * length // apart
    size = jnp.dtype(decoder.compute_dtype).itemsize
    wide = max(size, 4)
    heads, kv_heads = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    mlp = (2 if config.gated_mlp else 1) * config.mlp_dim
    attended = heads * size + config.num_heads * wide  # its output and the log-sum-exp of its scores
    kept = {"full": 0, "attention": attended}
    kept["projections"] = attended + (heads + 2 * kv_heads + 2 * config.embed_dim + mlp) * size
    between = (6 * config.embed_dim + 4 * (heads + kv_heads) + 3 * config.mlp_dim) * wide  # norms, rotation, activation
    kept["none"] = kept["projections"] + between
    scores = 3 * tokens * config.num_heads * length * wide if decoder.attention == "dense" else 0
    logits = 2 * min(rows * slots // apart, SLOT_CHUNK) * min(config.vocab_size, VOCAB_BLOCK) * wide
    at_once = logits if config.head == "lm" else 0  # either those, or one layer
    if decoder.remat == "none":
        layers = config.num_layers * (tokens * kept["none"] + scores)
    else:
        layers = config.num_layers * tokens * kept[decoder.remat]
        at_once = max(at_once, tokens * (kept["projections"] + between) + scores)
    residual = config.num_layers * tokens * config.embed_dim * size
    return residual + layers + at_once


def head_bytes(decoder: Decoder, mesh: jax.sharding.Mesh) -> int:
    """What the LM head takes of each device where others have other tokens, besides the device's part of it.

    That is the whole of it, gathered in the dtype of its products, and as many sums of its gradient, at least float32,
    before they are reduced; of the vocabulary of each device that the tensor axis splits.
    """
    if tokens_apart(mesh) == 1 or decoder.config.head != "lm":
        return 0
    size = decoder.multiplied_dtype.itemsize
    numbers = decoder.config.vocab_size * decoder.config.embed_dim * tokens_apart(mesh) // mesh.size
    return numbers * (size + max(jnp.dtype(decoder.compute_dtype).itemsize, 4))


def state_bytes(params: dict, optimizer: optax.GradientTransformation, *, accumulates: bool, copies: int = 0) -> int:
    """What parameters, the optimizer's moments and gradients take of each device.

    Args:
      params: placed arrays, or their shapes.
      optimizer: of the run.
      accumulates: whether a step has several microbatches, whose gradients add up.
      copies: of the parameters that are held besides: 1 for a reference of its own.
    """
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
    )
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))
    return held * (2 + accumulates + copies) + held * moments // whole


def device_memory(device: jax.Device) -> int:
    """Bytes of a device's memory; of the host's where the device is its CPU."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


IN_USE = {"device_memory": "bytes_in_use", "device_memory_peak": "peak_bytes_in_use"}
"""Metric -> what jax calls it."""
RSS_UNIT = 1 if sys.platform == "darwin" else 2**10
"""Bytes that `ru_maxrss` counts in."""


def memory_in_use(mesh: jax.sharding.Mesh) -> dict[str, float]:
    """GiB in use, now and at most: of the fullest device of this process, where devices tell, and of the process."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    fullest = {metric: max((of.get(name, 0) for of in stats), default=0) for metric, name in IN_USE.items()}
    found = {metric: value for metric, value in fullest.items() if value}
    found["host_memory_peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
    return {metric: round(value / 2**30, 3) for metric, value in found.items()}


def choose_remat(decoder: Decoder, layout: Layout, state: int, mesh: jax.sharding.Mesh) -> Decoder:
    """The decoder with the fastest policy of recomputation that fits by the estimate; with `full` if none does.

    Args:
      decoder: of the run.
      layout: of its microbatches.
      state: `state_bytes`.
      mesh: where it runs.
    """
    device = mesh.local_devices[0]
    usable = USABLE.get(device.platform, USABLE_ELSEWHERE) * min(gathered(device_memory(device)))
    for remat in CHOSEN:
        chosen = dataclasses.replace(decoder, remat=remat)
        if state + layout_bytes(chosen, layout, mesh) <= usable:
            return chosen
    return chosen


def layout_bytes(decoder: Decoder, layout: Layout, mesh: jax.sharding.Mesh) -> int:
    """`activation_bytes` of the largest microbatch of a layout and `head_bytes`, on each device."""
    parts = batch_size_multiple(mesh)
    apart = tokens_apart(mesh) // parts
    return head_bytes(decoder, mesh) + max(
        activation_bytes(decoder, rows=shape.rows // parts, length=length, slots=slots, apart=apart)
        for shape in layout.shapes
        for length, slots in [(shape.capacity.length, shape.capacity.slots)]
    )


@contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """RunStopped, with what to change, in place of the runtime's error where a device has too little memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        advice = [] if config.remat == "full" else ["--remat full"]
        advice += [f"--microbatch-tokens below {config.microbatch_tokens} in another --output-dir", "more devices"]
        raise RunStopped(
            f"a device ran out of memory ({str(error).splitlines()[0]}); fix: {', or '.join(advice)}"
        ) from error
