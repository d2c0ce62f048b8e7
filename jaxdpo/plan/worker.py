"""One plan, in a process of its own: `python -m jaxdpo.plan.worker`, started by `command.py`.

It reads the options as JSON from standard input and answers on standard output, one JSON object a line: `{"say": text}`
while it works, then `{"plan": …}`, or `{"error": text}` for bad input. Whatever libraries print goes to standard error.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import jax

from jaxdpo.chips import chip_of
from jaxdpo.config import PlanConfig
from jaxdpo.hf import load_config
from jaxdpo.hub import resolve_model
from jaxdpo.models import TransformerConfig
from jaxdpo.plan.job import make_job
from jaxdpo.plan.programs import Compiled, TooLarge, compiled_programs
from jaxdpo.plan.result import Machine, plan_result
from jaxdpo.plan.roofline import Rates, tpu_rates
from jaxdpo.plan.search import candidates
from jaxdpo.plan.shapes import SHAPES, known_config
from jaxdpo.plan.topology import LOCAL, USABLE_GIB, chips_of, slice_devices
from jaxdpo.train.defaults import default_dtype
from jaxdpo.train.flops import measured_peak
from jaxdpo.train.memory import device_memory
from jaxdpo.types import InputError

TRIED = 3
"""Ways to do the job that are compiled, at most, until one fits."""

QUICK = -1.0
"""Effort of a quick plan's compilation, of jax's scale from -1 to 1. Of SmolLM2's step on v5e:2x4 it took 51 s of CPU
time in place of 204, for the same FLOPs, 4 % more bytes sent and a peak that was 8 % lower."""


def set_effort(*, quick: bool) -> None:
    """The compiler's effort from now on: the least, or the usual one."""
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", QUICK if quick else 0.0)
    else:  # newer versions of jax know levels alone
        jax.config.update("jax_optimization_level", "O1" if quick else "UNKNOWN")


def make_plan(config: PlanConfig, say: Callable[[str], None]) -> dict[str, Any]:
    """The plan as JSON; see the documentation's Plan for its keys.

    Args:
      config: the options.
      say: takes a line about what is being done.
    Raises:
      InputError: for what cannot be planned.
    """
    set_effort(quick=config.quick)
    architecture = _architecture(config.model)
    machine = machine_of(config)
    job = make_job(config, architecture, machine.devices, machine.usable)
    found = candidates(job, machine.rates, config.remat)
    programs: list[Compiled] = []
    refused: TooLarge | None = None
    for chosen, candidate in enumerate(found[:TRIED]):  # noqa: B007 - the last one is reported
        try:
            programs, refused = list(compiled_programs(job, candidate.placed, say)), None
        except TooLarge as error:
            programs, refused = [], error
            say(f"{error}, of {machine.usable / 2**30:.2f}: it does not fit")
        if programs and max(item.memory for item in programs) <= machine.usable:
            break
    return plan_result(config, job, machine, found, chosen, programs, refused)


def _architecture(name: str) -> TransformerConfig:
    return known_config(name) if name in SHAPES else load_config(resolve_model(name, weights=False))


def machine_of(config: PlanConfig) -> Machine:
    """The devices that are planned for."""
    if config.topology != LOCAL:
        chip, per_slice = chips_of(config.topology)
        devices = slice_devices(config.topology, config.slices)
        chips = per_slice * config.slices
        rates = tpu_rates(chip, len(devices) // chips, config.dtype or default_dtype(devices))
        # With little effort arrays stay in main memory that would otherwise be kept beside the matrix units.
        rates = rates._replace(memory=None) if config.quick else rates
        return Machine(devices, chips, rates, USABLE_GIB[chip.name] * 2**30)
    devices = jax.devices()
    dtype = config.dtype or default_dtype(devices)
    known = chip_of(devices[0].device_kind)
    memory = float(device_memory(devices[0]))
    if devices[0].platform == "cpu":  # devices of one host share its cores and its memory
        count = len(devices)
        return Machine(devices, count, Rates(measured_peak(dtype) / count, None, None, None), memory / count)
    if known is not None and dtype == "bfloat16":
        chips = max(1, len(devices) // known.devices)
        return Machine(devices, chips, tpu_rates(known, known.devices, dtype), memory)
    bandwidth = None if known is None else known.memory_bandwidth / known.devices
    return Machine(devices, len(devices), Rates(measured_peak(dtype), bandwidth, None, None), memory)


def main() -> None:
    """Answers one request."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**message: Any) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        config = PlanConfig(**json.load(sys.stdin))
        answer(plan=make_plan(config, lambda text: answer(say=text)))
    except InputError as error:
        answer(error=str(error))


if __name__ == "__main__":
    main()
