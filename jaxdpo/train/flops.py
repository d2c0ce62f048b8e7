"""Floating-point operations of a model, counted from its widths, and the rate that they are held against."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo.chips import chip_of
from jaxdpo.models import TransformerConfig
from jaxdpo.models.matmul import multiply
from jaxdpo.types import Batch


def layer_flops(config: TransformerConfig) -> float:
    """Floating-point operations of the layers on one token, forward, attention left out: two for each weight."""
    heads = 2 * (config.num_heads + config.num_kv_heads) * config.head_dim  # queries, outputs, keys and values
    mlp = (3 if config.gated_mlp else 2) * config.mlp_dim
    return 2.0 * config.num_layers * config.embed_dim * (heads + mlp)


def key_flops(config: TransformerConfig) -> float:
    """Of attention for one query and one key that it is computed with, in all layers: score and weighted value."""
    return 4.0 * config.num_layers * config.num_heads * config.head_dim


def slot_flops(config: TransformerConfig) -> float:
    """Of the LM head on one slot; a score head's are nothing beside the layers'."""
    return 2.0 * config.vocab_size * config.embed_dim if config.head == "lm" else 0.0


def forward_flops(config: TransformerConfig, *, rows: int, length: int, slots: int, keys: float) -> float:
    """Of one forward pass over packed rows, padding included, where each query is computed with so many keys."""
    per_token = layer_flops(config) + keys * key_flops(config)
    return rows * (length * per_token + slots * slot_flops(config))


def useful_flops(config: TransformerConfig, batch: Batch, *, reference: bool) -> float:
    """What a training step on a host batch cannot do without, however it is computed: the numerator of its MFU.

    Tokens go through the layers, slots through the head, and a query meets the keys that it sees. The backward pass
    costs twice the forward pass. Padding, masked scores and what is computed again do not count.

    Args:
      config: of the model.
      batch: preference trees; KTO's partners, which no gradient goes through, count forward alone.
      reference: whether the step also runs a reference forward.
    """
    groups, candidates = batch.candidate_mask.shape[1:]
    tokens, slots = batch.group > 0, batch.slot_owner < groups * candidates
    forward = learnt = _seen_flops(config, batch.positions, tokens, slots)
    if batch.label is not None:
        first = batch.slot_owner % candidates == 0
        learnt = _seen_flops(config, batch.positions, tokens & (batch.candidate <= 1), slots & first)
    return (1 + reference) * forward + 2 * learnt


def _seen_flops(config: TransformerConfig, positions: np.ndarray, tokens: np.ndarray, slots: np.ndarray) -> float:
    """Of one forward pass over these tokens, bool `[rows, length]`, and slots, bool `[rows, slots]`, nothing else."""
    number = np.count_nonzero(tokens)
    before = positions if config.sliding_window is None else np.minimum(positions, config.sliding_window - 1)
    keys = int((before * tokens).sum(dtype=np.int64)) + number  # a token sees its path up to itself
    in_layers = number * layer_flops(config) + keys * key_flops(config)
    return in_layers + np.count_nonzero(slots) * slot_flops(config)


class Peak(NamedTuple):
    """The rate of matrix products that a step is held against."""

    flops: float
    """Of one device, FLOP/s."""
    source: str
    """Where the figure is from, for people."""


def peak_of(device: jax.Device, dtype: str) -> Peak:
    """The published rate of a device in bfloat16, whatever the run computes in; of an unknown kind the measured one."""
    chip = chip_of(device.device_kind)
    if chip is None:
        return Peak(measured_peak(dtype), f"measured in {dtype}")
    return Peak(chip.flops / chip.devices, f"published for {chip.name} in bfloat16")


@functools.cache
def measured_peak(dtype: str, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Matrix-product rate of the first device in FLOP/s, by multiplying for `seconds`; measured once a process."""
    x = jnp.ones((size, size), dtype)
    square = jax.jit(lambda x: multiply(x, x))
    square(x).block_until_ready()
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        square(x).block_until_ready()
        products += 1
    return products * 2.0 * size**3 / (time.perf_counter() - began)
