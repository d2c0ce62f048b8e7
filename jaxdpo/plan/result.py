"""A plan as JSON: what was found out, and what follows from it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jaxdpo.config import PlanConfig
from jaxdpo.models import abstract_params
from jaxdpo.plan.analytic import keys_of, step_flops, useful_flops
from jaxdpo.plan.job import Job, Placed, shard_bytes
from jaxdpo.plan.programs import Compiled, TooLarge, computed_keys, scored_chunks, total
from jaxdpo.plan.roofline import Rates, roofline
from jaxdpo.plan.search import Candidate
from jaxdpo.train.forecast import empty_rows_warning
from jaxdpo.train.state import abstract_state

SHOWN = 8
"""Ways to do the job that a plan lists, the best first."""
GIB = 2.0**30


class Machine(NamedTuple):
    """The devices that are planned for."""

    devices: Sequence[jax.Device]
    chips: int
    """Accelerators; one of some kinds is two devices."""
    rates: Rates
    """Of a device."""
    usable: float
    """Bytes of a device's memory that programs may take."""


def plan_result(
    config: PlanConfig,
    job: Job,
    machine: Machine,
    found: Sequence[Candidate],
    chosen: int,
    programs: list[Compiled],
    refused: TooLarge | None,
) -> dict[str, Any]:
    """The plan.

    Args:
      config: the options.
      job: what is planned.
      machine: for what.
      found: the ways to do it, in order.
      chosen: which of them was compiled last.
      programs: of that one; none if the compiler refused it.
      refused: why.
    """
    placed = found[chosen].placed
    per_chip = len(machine.devices) // machine.chips
    peak = refused.needed if refused is not None else float(max(item.memory for item in programs))
    result = _facts(config, job, machine, placed) | {
        "fits": refused is None and peak <= machine.usable,
        "hbm_gib_per_chip": _number(peak * per_chip / GIB),
        "hbm_limit_gib": _number(machine.usable * per_chip / GIB),
        "hbm_gib_by_kind": _kinds(job, placed, peak, per_chip),
        "refused": None if refused is None else f"the compiler refuses {refused}",
        "compile_seconds": _number(sum(item.seconds for item in programs)),
        "programs": {item.name: _number(item.seconds) for item in programs},
        "warnings": [warning] if (warning := _warning(config, placed)) else [],
        "candidates": [_listed(item, i <= chosen, per_chip) for i, item in enumerate(found[:SHOWN])],
    }
    return result | (_times(config, job, machine, placed, programs) if programs else {})


def _facts(config: PlanConfig, job: Job, machine: Machine, placed: Placed) -> dict[str, Any]:
    """What is planned."""
    architecture, fill = job.decoder.config, placed.fill
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(job.decoder)))
    return {
        "model": config.model,
        "parameters": parameters,
        "family": architecture.model_type,
        "topology": config.topology,
        "slices": config.slices,
        "chips": machine.chips,
        "devices": len(machine.devices),
        "device_kind": machine.devices[0].device_kind,
        "mesh": mesh_text(placed.mesh),
        "remat": placed.decoder.remat,
        "attention": placed.decoder.attention,
        "dtype": job.config.dtype,
        "batch_size": config.batch_size,
        "prompt_tokens": config.prompt_tokens,
        "completion_tokens": config.completion_tokens,
        "length": config.length,
        "quick": config.quick,
        "microbatches": len(placed.batches),
        "rows": len(placed.batches[0].tokens),
        "slots": placed.batches[0].slot_owner.shape[1],
        "fill": _number(fill.length),
        "empty_rows": fill.empty_rows,
    }


def _kinds(job: Job, placed: Placed, peak: float, per_chip: int) -> dict[str, float | None]:
    """What the peak is made of: activations are the rest, temporary arrays of all kinds."""
    state = abstract_state(abstract_params(placed.decoder, placed.mesh), job.optimizer, placed.mesh)
    parameters, moments = shard_bytes(state.params), shard_bytes(state.opt_state)
    kinds: dict[str, float] = {"parameters": parameters, "optimizer": moments, "gradients": parameters}
    kinds["activations"] = max(0.0, peak - sum(kinds.values()))
    return {name: _number(size * per_chip / GIB) for name, size in kinds.items()}


def _times(config: PlanConfig, job: Job, machine: Machine, placed: Placed, programs: list[Compiled]) -> dict[str, Any]:
    """Work and the least time of it."""
    per_chip, devices = len(machine.devices) // machine.chips, len(machine.devices)
    keys, costs = keys_of(job), total(programs)
    bound = roofline(costs, machine.rates)
    before = roofline(total(programs, reference=True), machine.rates)
    chunks = [scored_chunks(batch.slot_owner, batch.candidate_mask, placed.mesh) for batch in placed.batches]
    scored = sum(used * width for used, width in chunks)
    useful = useful_flops(
        job.decoder.config, tokens=int(job.dataset.tokens.sum()), scored=int(job.dataset.slots.sum()), keys=keys
    )
    return {
        "flops_per_step": costs.flops * devices,
        "flops_per_step_by_arithmetic": step_flops(placed, keys=computed_keys(job, placed), scored=scored),
        "useful_flops_per_step": useful,
        "hbm_bytes_per_chip": None if config.quick else costs.bytes * per_chip,
        "sent_bytes_per_chip": [
            {"collective": kind, "network": network, "bytes": size * per_chip, "calls": calls}
            for kind, network, size, calls in costs.collectives
        ],
        "seconds": {name: _number(value) for name, value in bound.seconds.items()},
        "step_seconds_bound": _number(bound.step),
        "bound": bound.bound,
        "pairs_per_second_bound": _number(config.batch_size / bound.step),
        "mfu_bound": _number(useful / (bound.step * machine.rates.flops * devices)),
        "reference_seconds_bound": _number(before.step),
        "reference_bound": before.bound,
    }


def _listed(candidate: Candidate, compiled: bool, per_chip: int) -> dict[str, Any]:
    return {
        "mesh": mesh_text(candidate.placed.mesh),
        "remat": candidate.placed.decoder.remat,
        "estimated_gib_per_chip": _number(candidate.memory * per_chip / GIB),
        "estimated_fits": candidate.fits,
        "estimated_seconds": _number(candidate.roofline.step),
        "estimated_bound": candidate.roofline.bound,
        "compiled": compiled,
    }


def _warning(config: PlanConfig, placed: Placed) -> str | None:
    return empty_rows_warning(placed.fill, f"{config.batch_size} pairs", placed.mesh)


def mesh_text(mesh: jax.sharding.Mesh) -> str:
    """A mesh as `--mesh` takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "fsdp=1"


def _number(value: float) -> float | None:
    """Four significant digits; None for what the compiler did not say."""
    return None if math.isnan(value) else float(f"{value:.4g}")
