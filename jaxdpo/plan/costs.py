"""What a compiled program costs each device: FLOPs of its matrix products, bytes of memory, bytes of each collective.

All of it is read off the text of the program as the compiler left it, so that what the partitioner added (gathers of
parameters, reductions of gradients) and what it repeats (recomputed layers) counts. Kernels that the compiler cannot
look into, such as splash attention, show as calls; their FLOPs are counted elsewhere.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxdpo.plan.collectives import Collective, collective_of
from jaxdpo.plan.hlo import Computation, Instruction, Program, Shape

_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "iota", "async-start", "async-update", "async-done", "send", "recv", "opt-barrier",
}  # fmt: skip
"""Opcodes that move nothing by themselves."""
_WINDOWS = ("dynamic-slice", "slice", "gather")
"""Opcodes that read no more of their first operand than they return."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one run of a program, on each device.

    Attributes:
      flops: of matrix products and kernels.
      bytes: read from and written to the device's main memory.
      collectives: by kind and network.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]

    def network_bytes(self, network: str) -> float:
        """What a device sends over a network."""
        return sum(item.bytes for item in self.collectives if item.network == network)

    def __add__(self, other: "Costs") -> "Costs":
        merged: dict[tuple[str, str], list[float]] = {}
        for kind, network, size, calls in self.collectives + other.collectives:
            total = merged.setdefault((kind, network), [0.0, 0.0])
            total[0], total[1] = total[0] + size, total[1] + calls
        collectives = tuple(Collective(*key, *total) for key, total in sorted(merged.items()))
        return Costs(self.flops + other.flops, self.bytes + other.bytes, collectives)

    def times(self, number: float) -> "Costs":
        """Of so many runs."""
        return Costs(
            self.flops * number,
            self.bytes * number,
            tuple(item._replace(bytes=item.bytes * number, calls=item.calls * number) for item in self.collectives),
        )


NOTHING = Costs(0.0, 0.0, ())


def costs_of(program: Program, *, slices: int = 1, kernels: Mapping[str, float] | None = None) -> Costs:
    """Adds up what a program executes.

    Args:
      program: from `hlo.parse`.
      slices: that the devices belong to, for what is reduced between them.
      kernels: FLOPs of one call of a kernel that the compiler does not look into, by a part of its name.
    Raises:
      ValueError: for a loop whose trip count nothing tells.
    """
    flops = memory = 0.0
    sent = NOTHING
    called = {
        item.attribute("calls") or ""
        for computation in program.computations.values()
        for item in computation.values()
        if item.opcode == "fusion"
    }
    reads = {name: _reads(name, program.computations) for name in called}
    for execution in program.executions():
        instruction, computation, times, inside = execution
        flops += times * product_flops(instruction, computation)
        if kernels and instruction.attribute("custom_call_target") == '"tpu_custom_call"':
            flops += times * sum(of_call for name, of_call in kernels.items() if name in instruction.attributes)
        if not inside:
            memory += times * memory_bytes(instruction, computation, program.computations, reads)
        collective = collective_of(execution, slices)
        if collective is not None:
            sent += Costs(0.0, 0.0, (collective,))
    return Costs(flops, memory, sent.collectives)


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of a matrix product or convolution, two for each product of numbers; 0 of anything else."""
    count = _PRODUCTS.get(instruction.opcode)
    return count(instruction, computation) if count else 0.0


def _dot(instruction: Instruction, computation: Computation) -> float:
    lhs = _operand(instruction, computation, 0).dims
    return 2.0 * instruction.shapes[0].size * math.prod(lhs[i] for i in instruction.numbers("lhs_contracting_dims"))


def _library_product(instruction: Instruction, computation: Computation) -> float:
    """Of a call of a library, whose configuration says what is contracted."""
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    if not found:
        return 0.0
    lhs = _operand(instruction, computation, 0).dims
    return 2.0 * instruction.shapes[0].size * math.prod(lhs[int(i)] for i in re.findall(r"\d+", found[1]))


def _convolution(instruction: Instruction, computation: Computation) -> float:
    """TPU compilers write matrix products as convolutions: batch dimensions become windows over padding and holes."""
    labels = instruction.attribute("dim_labels") or ""
    lhs_labels, rhs_labels, out_labels = re.split("_|->", labels)
    lhs, rhs = (_operand(instruction, computation, i).dims for i in (0, 1))
    out = instruction.shapes[0].dims
    stated = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(re.findall(r"(\w+)=(\S+)", stated[1])) if stated else {}
    pairs = 1
    for i in range(sum(label.isdigit() for label in lhs_labels)):
        sizes = (lhs[lhs_labels.index(str(i))], rhs[rhs_labels.index(str(i))], out[out_labels.index(str(i))])
        pairs *= _window_pairs(*sizes, {key: text.split("x")[i] for key, text in window.items()})
    batch, features = out[out_labels.index("b")], out[out_labels.index("f")]
    groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * rhs[rhs_labels.index("i")] * pairs / groups


def _window_pairs(size: int, kernel: int, out: int, window: Mapping[str, str]) -> int:
    """Pairs of a place of the output and one of the kernel that meet a number, not padding and not a hole."""
    stride, hole, spread = (int(window.get(key, 1)) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    places = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
    return int(((places >= 0) & (places < (size - 1) * hole + 1) & (places % hole == 0)).sum())


_PRODUCTS: Mapping[str, Callable[[Instruction, Computation], float]] = {
    "dot": _dot,
    "convolution": _convolution,
    "custom-call": _library_product,
}


def memory_bytes(
    instruction: Instruction,
    computation: Computation,
    computations: Mapping[str, Computation],
    reads: Mapping[str, Mapping[int, float]],
) -> float:
    """What an instruction reads and writes of main memory; 0 for what only names or groups arrays."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0.0
    results = _main(instruction.shapes)
    if opcode in ("copy-start", "slice-start"):
        target = instruction.shapes[opcode == "slice-start"]  # of a tuple that names the source as well
        ends = (_operand(instruction, computation, 0), target)
        return float(target.bytes * sum(end.space == 0 for end in ends))
    if opcode.endswith("-start"):
        return results  # of a tuple that holds the operands as well
    if opcode in _WINDOWS:
        return 2.0 * results
    if opcode == "dynamic-update-slice":
        return 2.0 * _main([_operand(instruction, computation, 1)])
    inner = computations[instruction.attribute("calls") or ""] if opcode == "fusion" else None
    limits = reads[instruction.attribute("calls") or ""] if inner is not None else {}
    read = 0.0
    for i, name in enumerate(instruction.operands):
        size = _main(computation[name].shapes) if name in computation else 0.0
        read += min(size, limits.get(i, size))
    written = results if inner is None else min(results, _written(inner, results))
    return read + written


def _main(shapes: Sequence[Shape]) -> float:
    """Bytes of what lies in main memory."""
    return _bytes([shape for shape in shapes if shape.space == 0])


def _bytes(shapes: Sequence[Shape]) -> float:
    return float(sum(shape.bytes for shape in shapes))


def _reads(name: str, computations: Mapping[str, Computation]) -> dict[int, float]:
    """Of a fusion, what it reads of those parameters that it takes windows of or updates in place, by their number."""
    parameters = [item for item in computations[name].values() if item.opcode == "parameter"]
    read = {int(item.arguments): _window(item.name, computations[name], computations) for item in parameters}
    return {number: size for number, size in read.items() if size is not None}


def _window(name: str, computation: Computation, computations: Mapping[str, Computation]) -> float | None:
    """Bytes of the windows that are read of a value; None where one of its users reads all of it."""
    total = 0.0
    for user in computation.values():
        places = [i for i, operand in enumerate(user.operands) if operand == name]
        read: list[float | None] = []
        if places and user.opcode == "bitcast":
            read = [_window(user.name, computation, computations)]
        elif places and user.opcode == "fusion":
            inner = user.attribute("calls") or ""
            read = [_reads(inner, computations).get(place) for place in places]
        elif places == [0] and user.opcode in (*_WINDOWS, "dynamic-update-slice"):
            read = [0.0 if user.opcode == "dynamic-update-slice" else _bytes(user.shapes)]
        elif places:
            return None
        for size in read:
            if size is None:
                return None
            total += size
    return total


def _written(computation: Computation, results: float) -> float:
    """What a fusion writes: where its roots update arrays in place, the updates."""
    *_, root = computation.values()
    roots = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
    total = 0.0
    for item in roots:
        while item.opcode == "bitcast" and item.operands[0] in computation:
            item = computation[item.operands[0]]
        changed = computation.get(item.operands[1]) if item.opcode == "dynamic-update-slice" else None
        total += _bytes((changed or item).shapes)
    return total


def _operand(instruction: Instruction, computation: Computation, index: int) -> Shape:
    return computation[instruction.operands[index]].shapes[0]
