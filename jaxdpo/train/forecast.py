"""What a run will do and about how long it will take, printed before it starts."""

from collections.abc import Sequence

import jax
import numpy as np

from jaxdpo.config import DPOConfig, RunConfig
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.layout import Fill, fill_of
from jaxdpo.data.packing import Costs, Layout
from jaxdpo.data.pipeline import microbatches
from jaxdpo.data.plan import StepPlan
from jaxdpo.losses import LOSSES, LossSpec
from jaxdpo.models import Decoder
from jaxdpo.sharding import batch_size_multiple, mesh_summary
from jaxdpo.train.flops import forward_flops, key_flops, layer_flops, measured_peak, slot_flops
from jaxdpo.train.memory import device_memory, layout_bytes
from jaxdpo.types import Batch

UTILISATION = 0.35
"""Share of the matrix-product rate that a step is taken to reach: cautious, and only the printed time rests on it."""
SKIPPING = ("blockwise", "splash")
"""Forms of attention whose work is that of the groups, not that of the rows they are packed into."""
EMPTY = 0.25
"""Share of empty rows from which a run warns."""
BACKWARD = {"none": 3.0, "projections": 3.0, "attention": 4.0, "full": 4.0}
"""Cost of forward, what is computed again and backward over that of the forward pass alone, by `remat`."""


def layout_costs(decoder: Decoder) -> Costs:
    """What the choice of a layout weighs, by the widths of the model and by the keys that its attention computes."""
    config, layers = decoder.config, layer_flops(decoder.config)
    whole_rows = decoder.attention not in SKIPPING
    return Costs(slot=slot_flops(config) / layers, key=key_flops(config) / layers if whole_rows else 0.0)


def print_forecast(
    config: RunConfig,
    loss: LossSpec,
    model: Decoder,
    params: dict,
    state: int,
    datasets: Sequence[TokenizedDataset],
    layout: Layout,
    order: StepPlan,
    total: int,
) -> None:
    """Prints model, layout, memory (`state` bytes a device besides activations) and time of a run of `total` steps."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    devices = jax.tree.leaves(params)[0].sharding.device_set
    sampled = [microbatches(datasets[0], step, layout) for step in order.sampled_steps()]
    per_step = sum(map(len, sampled)) / len(sampled)
    pairs = min(order.batch_size, order.groups_per_epoch)
    flops = sum(_forward_flops(model, batch, datasets[0]) for step in sampled for batch in step) / len(sampled)
    # Forward passes in steps: the reference's and, on held-out data, the reference's and the policy's at the end.
    coupled = loss.coupling in ("statistic", "sort") and per_step > 1  # all log-probs first, then the gradient
    passes = 2 * sum(map(len, datasets[1:])) / pairs + coupled * total
    passes += total if config.reference_at_every_step else loss.needs_reference * min(total, order.num_steps_per_epoch)
    work = flops * (BACKWARD[model.remat] * total + passes)
    seconds = work / (UTILISATION * measured_peak(str(model.multiplied_dtype)) * len(devices))
    device = mesh.local_devices[0]
    activations, of = layout_bytes(model, layout, mesh), device_memory(device)
    print(f"model      {size / 1e6:.1f} M parameters, {config.dtype}, on {mesh_summary(mesh)}")
    groups = "pairs" if datasets[0].candidates == 2 and not datasets[0].labelled else "groups"
    fill = fill_of(batch for step in sampled for batch in step)
    print(f"layout     {layout.summary()}; {fill.summary()}")
    if warning := empty_rows_warning(fill, f"{pairs} {groups}", mesh):
        print(f"           warning: {warning}")
    print(f"run        {total} steps of {pairs} {groups} in {per_step:.1f} microbatches; {config.objective}")
    if isinstance(config, DPOConfig) and datasets[0].candidates > 2 and not datasets[0].labelled:
        over = [name for name in config.losses if LOSSES[name].candidates == 2]
        if over:
            print(f"           {', '.join(over)} over all ordered pairs of each ranking")
    schedule = f"{config.learning_rate:g} after {config.warmup_steps} warm-up steps"
    print(f"optimizer  {config.optimizer}, learning rate {schedule}")
    print(f"compute    attention {model.attention}, remat {model.remat}")
    print(
        f"memory     {state / 2**30:.1f} GiB a device for parameters, gradients and optimizer, about "
        f"{activations / 2**30:.1f} GiB for activations, of {of / 2**30:.1f} GiB"
    )
    print(f"time       about {duration(seconds)}, at {UTILISATION:.0%} of the measured matrix-product rate")


def empty_rows_warning(fill: Fill, groups: str, mesh: jax.sharding.Mesh) -> str | None:
    """What to say where a step's groups, as "64 pairs", leave many rows of a mesh empty; None where they do not."""
    apart = batch_size_multiple(mesh)
    if apart == 1 or fill.empty_rows <= EMPTY * fill.rows:
        return None
    return (
        f"{groups} a step do not fill the rows of data x fsdp = {apart} devices, which compute empty ones; "
        "fix: a larger --batch-size, or part of the devices on tensor or context (--mesh)"
    )


def _forward_flops(decoder: Decoder, batch: Batch, dataset: TokenizedDataset) -> float:
    """Of one forward pass over a microbatch."""
    (rows, length), slots = batch.tokens.shape, batch.slot_owner.shape[1]
    sizes = dataset.tokens.astype(np.float64)
    keys = np.square(sizes).sum() / sizes.sum() if decoder.attention in SKIPPING else length
    return forward_flops(decoder.config, rows=rows, length=length, slots=slots, keys=float(keys))


def duration(seconds: float) -> str:
    """A duration to read: `40 s`, `5 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
