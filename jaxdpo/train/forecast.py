"""What a run will do and about how long it will take, printed before it starts."""

import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxdpo.config import DPOConfig, RunConfig
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.layout import fill_of
from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import microbatches
from jaxdpo.data.plan import StepPlan
from jaxdpo.losses import LOSSES, LossSpec
from jaxdpo.models import Decoder, TransformerConfig
from jaxdpo.train.optimizer import make_optimizer

UTILISATION = 0.35
"""Share of the matrix-product rate that a step is taken to reach: cautious, and only the printed time rests on it."""
BACKWARD = 4.0
"""Cost of forward, recomputed forward and backward over that of the forward pass alone."""


def forward_flops(config: TransformerConfig, parameters: int, *, rows: int, length: int, slots: int) -> float:
    """Floating-point operations of one forward pass over `rows` packed rows, padding included.

    Two per weight and token, `4 * length * heads * head_dim` per token and layer for dense attention, and the LM head
    on slots only.
    """
    tables = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    per_token = 2.0 * (parameters - tables) + 4.0 * length * config.num_heads * config.head_dim * config.num_layers
    return rows * (length * per_token + slots * 2.0 * config.vocab_size * config.embed_dim)


def measured_peak(dtype: str, *, size: int = 1024, seconds: float = 0.3) -> float:
    """Matrix-product rate of the first device in FLOP/s, by multiplying for `seconds`."""
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: (x @ x) * 0)
    multiply(x).block_until_ready()
    began, products = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        multiply(x).block_until_ready()
        products += 1
    return products * 2.0 * size**3 / (time.perf_counter() - began)


def print_forecast(
    config: RunConfig,
    loss: LossSpec,
    model: Decoder,
    params: dict,
    datasets: Sequence[TokenizedDataset],
    layout: Layout,
    order: StepPlan,
    total: int,
) -> None:
    """Prints model, layout, memory and time of a run of `total` optimizer steps."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    devices = jax.tree.leaves(params)[0].sharding.device_set
    sampled = [microbatches(datasets[0], step, layout) for step in order.sampled_steps()]
    per_step = sum(map(len, sampled)) / len(sampled)
    length, slots = layout.capacity.length, layout.capacity.slots
    pairs = min(order.batch_size, order.groups_per_epoch)
    flops = forward_flops(model.config, size, rows=layout.rows, length=length, slots=slots)
    # Forward passes in steps: the reference's and, on held-out data, the reference's and the policy's at the end.
    moving = isinstance(config, DPOConfig) and config.ref_model_sync_steps is not None
    coupled = loss.coupling in ("statistic", "sort") and per_step > 1  # all log-probs first, then the gradient
    passes = 2 * sum(map(len, datasets[1:])) / pairs + coupled * total
    passes += total if moving else loss.needs_reference * min(total, order.num_steps_per_epoch)
    work = flops * per_step * (BACKWARD * total + passes)
    seconds = work / (UTILISATION * measured_peak(model.compute_dtype) * len(devices))
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(params))  # on each device
    moments = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(make_optimizer(config).init, params))) / size
    accumulated = 2 if any(len(batches) > 1 for batches in sampled) else 1
    memory = 4 * held * (1 + moments + accumulated + moving)
    print(f"model      {size / 1e6:.1f} M parameters, {model.compute_dtype}, on {len(devices)} device(s)")
    print(f"layout     {layout.summary()}; {fill_of(batch for step in sampled for batch in step).summary()}")
    groups = "pairs" if datasets[0].candidates == 2 and not datasets[0].labelled else "groups"
    print(f"run        {total} steps of {pairs} {groups} in {per_step:.1f} microbatches; {config.objective}")
    if isinstance(config, DPOConfig) and datasets[0].candidates > 2 and not datasets[0].labelled:
        over = [name for name in config.losses if LOSSES[name].candidates == 2]
        if over:
            print(f"           {', '.join(over)} over all ordered pairs of each ranking")
    schedule = f"{config.learning_rate:g} after {config.warmup_steps} warm-up steps"
    print(f"optimizer  {config.optimizer}, learning rate {schedule}")
    print(f"memory     {memory / 2**30:.1f} GiB a device for parameters, gradients and optimizer, plus activations")
    print(f"time       about {duration(seconds)}, at {UTILISATION:.0%} of the measured matrix-product rate")


def duration(seconds: float) -> str:
    """A duration to read: `40 s`, `5 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
