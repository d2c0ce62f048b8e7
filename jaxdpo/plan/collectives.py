"""What devices send to each other, by the collectives in a compiled program.

Bytes are those that one device sends in a ring or a tree that wastes nothing: of `n` devices, `(n - 1) / n` of what a
gather makes or a reduction takes, and twice that where a reduction leaves the whole with all of them.
"""

import math
import re
from typing import NamedTuple

from jaxdpo.plan.hlo import Execution, Instruction

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """All of one kind over one network in a program."""

    kind: str
    network: str
    """`ici`: the links within a slice, a host or a node; `dcn`: the network between slices."""
    bytes: float
    """That a device sends."""
    calls: float


def collective_of(execution: Execution, slices: int) -> Collective | None:
    """What a device sends by an instruction, if it is a collective, in the least number of bytes that does it."""
    instruction, computation, times, fused = execution
    if instruction.opcode == "send":
        return _between_slices(instruction, times, slices)
    kind = instruction.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    started = any("AsyncCollectiveStart" in item.attributes for item in computation.values())
    if fused and "async_collective_fusion_config" in instruction.attributes and not started:
        return None  # the same one, whose progress is spread over several fusions
    arrays = [shape for shape in instruction.shapes if shape.size]
    size = float(sum(shape.bytes for shape in arrays))
    if instruction.opcode.endswith("-start") and len(arrays) > 1:
        size = float(max(shape.bytes for shape in arrays))  # of a tuple of what goes in and what comes out
    members = _group_size(instruction)
    if members == 1 and kind != "collective-permute":
        return None
    if kind == "all-reduce" and any(item.opcode == "dynamic-slice" for item in computation.values()) and fused:
        kind, size = "reduce-scatter", size / members  # what the compiler makes of one whose result is cut up
    share = (members - 1) / members
    sent = {
        "all-gather": size * share,
        "all-reduce": 2 * size * share,
        "reduce-scatter": size * (members - 1),
        "all-to-all": size * share,
        "collective-permute": size,
    }[kind]
    return Collective(kind, "ici", times * sent, times)


def _between_slices(instruction: Instruction, times: float, slices: int) -> Collective | None:
    """A collective over the network between slices, which goes by way of the host."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.attributes)
    if not found:
        return None
    kind = found[1].lower().replace("_", "-")
    factor = 2 * (slices - 1) / slices if kind == "all-reduce" else slices - 1
    return Collective(kind, "dcn", times * factor * instruction.shapes[0].bytes, times)


def _group_size(instruction: Instruction) -> int:
    """Devices of each group, in any of the three notations."""
    text = instruction.attributes
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'?(\w+)'?=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"\w+", found[2]))
    return 1
