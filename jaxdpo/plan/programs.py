"""The programs of a step and of the reference pass, compiled for the devices that are planned for, and read."""

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.lm_head import CHUNKS
from jaxdpo.logprobs import head_chunks
from jaxdpo.models import abstract_params
from jaxdpo.models.blockwise import BLOCK, KEY_BLOCKS, find_blocks
from jaxdpo.plan.analytic import KERNELS, keys_of
from jaxdpo.plan.costs import NOTHING, Costs, costs_of
from jaxdpo.plan.hlo import parse
from jaxdpo.plan.job import Job, Placed, shard_bytes
from jaxdpo.reference import make_logp_program
from jaxdpo.sharding import batch_size_multiple, num_slices, placed_shapes, tokens_apart
from jaxdpo.train.flops import key_flops
from jaxdpo.train.objective import preference_task, step_counts
from jaxdpo.train.state import TrainState, abstract_state
from jaxdpo.train.step import AT_ONCE, MICROBATCHES, Microbatch, StepPrograms, make_programs

REFERENCE = "reference"


class Compiled(NamedTuple):
    """One program."""

    name: str
    runs: float
    """In a step; of the reference pass, over the pairs of one."""
    costs: Costs
    """Of one run, on each device."""
    memory: int
    """Bytes of a device at its peak: the compiler's figure, and what a run holds besides the program's arguments."""
    seconds: float
    """That compiling it took."""


class TooLarge(Exception):
    """The compiler refused a program: it needs more memory than a device has."""

    def __init__(self, name: str, needed: float) -> None:
        super().__init__(f"{name} needs {needed / 2**30:.1f} GiB")
        self.name, self.needed = name, needed


def compiled_programs(job: Job, placed: Placed, say: Callable[[str], None]) -> Iterator[Compiled]:
    """Compiles what a step runs, then the reference pass, one program at a time.

    Args:
      job: what is planned.
      placed: where.
      say: takes a line about what is being done.
    Raises:
      TooLarge: if the compiler finds that a program exceeds a device's memory.
    """
    params = abstract_params(placed.decoder, placed.mesh)
    state = abstract_state(params, job.optimizer, placed.mesh)
    trips = trip_counts(placed)
    with jax.set_mesh(placed.mesh):
        for name, runs, program, arguments, beside in _programs(job, placed, state):
            say(f"compiling {name} for {placed.mesh.size} devices")
            began = time.perf_counter()
            compiled = _compile(name, program, arguments)
            took = time.perf_counter() - began
            costs = costs_of(
                parse(compiled.as_text(), trips),
                slices=num_slices(list(placed.mesh.devices.flat)),
                kernels=kernel_flops(placed, keys_of(job)),
            )
            peak = peak_bytes(compiled.memory_analysis(), job.devices[0].platform)
            yield Compiled(name, runs, costs, peak + beside, took)


def total(programs: list[Compiled], *, reference: bool = False) -> Costs:
    """What a step costs each device, or the reference pass over the pairs of one."""
    costs = (item.costs.times(item.runs) for item in programs if (item.name == REFERENCE) == reference)
    return sum(costs, NOTHING)


def _programs(job: Job, placed: Placed, state: TrainState) -> Iterator[tuple[str, float, Any, tuple, int]]:
    """Name, runs, program, arguments, and bytes that a device holds besides: of all that a step runs."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs: StepPrograms = make_programs(preference_task(placed.decoder, job.loss), job.optimizer, shardings)
    number, counts = len(placed.batches), step_counts(placed.batches)
    reference = np.zeros(placed.batches[0].slot_owner.shape, np.float32)
    microbatch = placed_shapes(Microbatch(placed.batches[0], reference), placed.mesh)
    if number == 1:
        yield "step", 1, programs.step, (state, microbatch, counts, job.scalars), 0
    else:
        calls = math.ceil(number / AT_ONCE)
        filled = [microbatch] * AT_ONCE
        arguments = (state.params, state.params, filled, number, counts, job.scalars)
        yield "accumulate", calls, programs.accumulate, arguments, shard_bytes(state.opt_state)
        metrics = jax.eval_shape(programs.accumulate, *arguments)[1]
        sums = {name: np.zeros((), value.dtype) for name, value in metrics.items()}
        yield "apply", 1, programs.apply, (state, state.params, sums, counts), 0
    # Held-out log-probs are computed in training, beside the optimizer's moments.
    program = make_logp_program(placed.decoder)
    yield REFERENCE, number, program, (state.params, microbatch.batch), shard_bytes(state.opt_state)


def peak_bytes(memory: Any, platform: str) -> int:
    """A program's peak on a device by `compiled.memory_analysis()`.

    TPU compilers state it. On other platforms temporary arrays are one allocation beside arguments and results, and the
    figure of that name leaves it out (measured on CPU, jax 0.10.2).
    """
    if platform == "tpu":
        return memory.peak_memory_in_bytes
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def _compile(name: str, program: Any, arguments: tuple) -> Any:
    try:
        return program.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(name, needed_bytes(str(error))) from error


def needed_bytes(message: str) -> float:
    """What a program needs, by the compiler's refusal; NaN where it does not say."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of|\(([\d.]+)([KMGT]?)\) exceeds available", message)
    if not found:
        return math.nan
    number, unit = found[1] or found[3], found[2] or found[4] or ""
    return float(number) * 1024.0 ** ("KMGT".index(unit) + 1 if unit else 0)


def trip_counts(placed: Placed) -> Mapping[str, float]:
    """How often loops go round whose number depends on the data, on average: by their names in the program."""
    number = len(placed.batches)
    used = sum(scored_chunks(batch.slot_owner, batch.candidate_mask, placed.mesh)[0] for batch in placed.batches)
    # Without rows that are empty: devices wait for those that have more.
    blocks = [
        np.asarray(find_blocks(batch.positions, batch.group, batch.candidate).num_keys) for batch in placed.batches
    ]
    rows = np.concatenate(blocks)
    return {
        MICROBATCHES: number / math.ceil(number / AT_ONCE),
        CHUNKS: used / number,
        KEY_BLOCKS: float(rows[rows.any(axis=1)].mean()),
    }


def computed_keys(job: Job, placed: Placed) -> float:
    """Keys that each query is multiplied with: as `keys_of`, but whole blocks of them where the program shows that."""
    if placed.decoder.attention != "blockwise":
        return keys_of(job)
    return BLOCK * trip_counts(placed)[KEY_BLOCKS]


def scored_chunks(slot_owner: np.ndarray, candidate_mask: np.ndarray, mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Chunks that the fullest device takes through the LM head, and slots of one chunk on all devices."""
    parts = batch_size_multiple(mesh)
    apart = tokens_apart(mesh) // parts
    scored = (slot_owner < candidate_mask.shape[1] * candidate_mask.shape[2]).reshape(parts, -1)
    _, width = head_chunks(scored.shape[1], apart)
    return -(-int(scored.sum(axis=1).max()) // (width * apart)), parts * apart * width


def kernel_flops(placed: Placed, keys: float) -> dict[str, float]:
    """FLOPs of one call of a kernel, which is for the heads and queries that a device has of one row."""
    config, mesh = placed.decoder.config, placed.mesh
    queries = placed.layout.row_lengths[0] * batch_size_multiple(mesh) / mesh.size  # of heads that share a row
    product = queries * keys * key_flops(config) / (2 * config.num_layers)
    return {name: products * product for name, products in KERNELS.items()}
