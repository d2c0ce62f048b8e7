"""What a training step holds on a device, estimated before anything is compiled, and what a layer keeps by that."""

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import optax

from jaxdpo.config import RunConfig
from jaxdpo.data.packing import Layout
from jaxdpo.logprobs import SLOT_CHUNK
from jaxdpo.models import Decoder
from jaxdpo.sharding import batch_size_multiple, tokens_apart
from jaxdpo.types import RunStopped

CHOSEN = ("projections", "attention", "full")
"""What is chosen from, the fastest first; `none` keeps more than twice what `projections` does and saves no product."""
USABLE = {"cpu": 0.5}
USABLE_ELSEWHERE = 0.85
"""Share of a device's memory that an estimate may reach, by platform: a host's is shared with other programs."""


def activation_bytes(decoder: Decoder, *, rows: int, length: int, slots: int, apart: int = 1) -> int:
    """What a forward and backward pass over packed rows on one device holds besides parameters and gradients.

    It counts what each layer keeps by `decoder.remat`, the arrays of the one layer that is under way, and the logits of
    one chunk of slots. A device has a part of each of its rows where `apart` of them share their length.
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
    if decoder.remat == "none":
        layers = config.num_layers * (tokens * kept["none"] + scores)
    else:
        layers = config.num_layers * tokens * kept[decoder.remat] + tokens * (kept["projections"] + between) + scores
    residual = config.num_layers * tokens * config.embed_dim * size
    logits = 2 * rows * min(slots, SLOT_CHUNK) // apart * config.vocab_size * wide if config.head == "lm" else 0
    return residual + layers + logits


def state_bytes(params: dict, optimizer: optax.GradientTransformation, *, accumulates: bool, copies: int = 0) -> int:
    """What parameters, the optimizer's moments and gradients take of each device.

    Args:
      params: placed arrays.
      optimizer: of the run.
      accumulates: whether a step has several microbatches, whose gradients add up.
      copies: of the parameters that are held besides: 1 for a reference of its own.
    """
    held = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)
    )
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))
    return held * (2 + accumulates + copies) + held * moments // whole


def device_memory(device: jax.Device) -> int:
    """Bytes of a device's memory; of the host's where the device is its CPU."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def choose_remat(decoder: Decoder, layout: Layout, state: int, mesh: jax.sharding.Mesh) -> Decoder:
    """The decoder with the fastest policy of recomputation that fits by the estimate; with `full` if none does.

    Args:
      decoder: of the run.
      layout: of its microbatches.
      state: `state_bytes`.
      mesh: where it runs.
    """
    device = mesh.devices.flat[0]
    usable = USABLE.get(device.platform, USABLE_ELSEWHERE) * device_memory(device)
    for remat in CHOSEN:
        chosen = dataclasses.replace(decoder, remat=remat)
        if state + layout_bytes(chosen, layout, mesh) <= usable:
            return chosen
    return chosen


def layout_bytes(decoder: Decoder, layout: Layout, mesh: jax.sharding.Mesh) -> int:
    """`activation_bytes` of the largest microbatch of a layout, on each device."""
    parts = batch_size_multiple(mesh)
    apart = tokens_apart(mesh) // parts
    return max(
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
