"""The text of a compiled program: its computations, their instructions, and how often each is executed.

A compiler's own counts take the body of a loop once. Here every instruction comes with the product of the trip counts
of the loops around it. A trip count is what the compiler states, or the constant that the loop's condition compares
its counter with; a loop whose count is only known when the program runs has a name in the source (`jax.named_scope`),
and the caller says how often that one goes round.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
"""Of a number of each type; those of other types follow from the digits of their names."""


class Shape(NamedTuple):
    """One array of a result."""

    dtype: str
    dims: tuple[int, ...]
    space: int
    """0 is the device's main memory; on TPUs 1 is the memory beside the matrix units."""

    @property
    def size(self) -> int:
        """Numbers that it holds."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """What it takes, padding left out."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * BYTES[self.dtype] if self.dtype in BYTES else self.size * int(bits[0] if bits else 0) // 8


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of its result; several for a tuple."""
    arguments: str
    """Text between the parentheses."""
    attributes: str
    """Text behind them."""

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that it reads."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def attribute(self, key: str) -> str | None:
        """The value of `key=value`, up to the next comma or space; without a leading %."""
        found = re.search(rf"\b{key}=%?([^,\s]+)", self.attributes)
        return found[1] if found else None

    def numbers(self, key: str) -> tuple[int, ...]:
        """Those of `key={1,2}`; none where the key is missing."""
        found = re.search(rf"\b{key}={{([\d,]*)}}", self.attributes)
        return tuple(map(int, filter(None, found[1].split(",")))) if found else ()


Computation = dict[str, Instruction]
"""By name, in the order of the text; the last one is the root."""


class Execution(NamedTuple):
    """An instruction and how often a run of the program executes it."""

    instruction: Instruction
    computation: Computation
    """That it stands in."""
    times: float
    fused: bool
    """It is part of a fusion, whose intermediate results never reach memory."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed program.

    Attributes:
      computations: by name.
      entry: the name of the one that is called.
      trips: how often loops go round whose source names them, by that name.
    """

    computations: Mapping[str, Computation]
    entry: str
    trips: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def executions(self) -> Iterator[Execution]:
        """Every instruction that the program executes, those of loops and fusions included."""
        return self._of(self.entry, 1.0, fused=False)

    def _of(self, name: str, times: float, *, fused: bool) -> Iterator[Execution]:
        computation = self.computations[name]
        for instruction in computation.values():
            yield Execution(instruction, computation, times, fused)
            inner = times * self.trip_count(instruction, computation) if instruction.opcode == "while" else times
            for called in _called(instruction):
                yield from self._of(called, inner, fused=fused or instruction.opcode == "fusion")

    def trip_count(self, loop: Instruction, computation: Computation) -> float:
        """How often the body of a `while` is executed.

        Raises:
          ValueError: if nothing says so.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        scope = re.search(r'op_name="([^"]*)"', loop.attributes)
        words = re.findall(r"\w+", scope[1]) if scope else []
        # The innermost name is the loop's own: others are those of loops around it.
        named = [word for word in words if word in self.trips]
        counted = self._counted(loop, computation)
        if counted is None and not named:
            raise ValueError(f"loop {loop.name} ({scope[1] if scope else 'no name'}) does not tell how often it runs")
        return counted if counted is not None else self.trips[named[-1]]

    def _counted(self, loop: Instruction, computation: Computation) -> int | None:
        """The constant that the counter of a loop is compared with, less the one that it starts from."""
        condition = self.computations[loop.attribute("condition") or ""]
        *_, root = condition.values()
        limits = [condition[name] for name in root.operands if name in condition]
        constants = [int(limit.arguments) for limit in limits if limit.opcode == "constant"]
        counters = [int(limit.attribute("index") or 0) for limit in limits if limit.opcode == "get-tuple-element"]
        if root.opcode != "compare" or len(constants) != 1 or len(counters) != 1:
            return None
        start = _element(computation, loop.operands[0], counters[0])
        first = int(start.arguments) if start is not None and start.opcode == "constant" else 0
        last = constants[0] - first + (root.attribute("direction") == "LE")
        return -(-last // _step(self.computations[loop.attribute("body") or ""], counters[0]))


def parse(text: str, trips: Mapping[str, float] | None = None) -> Program:
    """A program from `compiled.as_text()`; `trips` as in `Program`."""
    computations: dict[str, Computation] = {}
    entry, root, last, current = "", "", "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
        if head and not line.startswith(" "):
            current = computations.setdefault(head[2], {})
            entry, root = (head[2] if head[1] else entry), ""
        elif current is not None and line.rstrip() == "}":
            current[root] = current.pop(root)
            current = None
        elif current is not None and (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
            root, last = (instruction.name if line.lstrip().startswith("ROOT ") else root), instruction.name
        elif current and last in current:  # attributes can go over several lines
            current[last] = current[last]._replace(attributes=current[last].attributes + line)
    return Program(computations, entry, trips or {})


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    opcode, _, behind = rest[end:].strip().partition("(")
    stop = _closing("(" + behind) - 2
    return Instruction(found[1], opcode, _shapes(rest[:end]), behind[:stop], behind[stop + 1 :])


def _closing(text: str) -> int:
    """Index behind the parenthesis that closes the first one."""
    depth = 0
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return place.end()
    return len(text)


@functools.lru_cache(maxsize=4096)
def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.finditer(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?", text)
    return tuple(
        Shape(
            shape[1],
            tuple(int(size.lstrip("<=")) for size in shape[2].split(",") if size),
            int(space[1]) if (space := re.search(r"S\((\d+)\)", shape[3] or "")) else 0,
        )
        for shape in found
    )


def _called(instruction: Instruction) -> list[str]:
    """The computations that an instruction executes: not those that say how two numbers are added up."""
    if instruction.opcode == "while":
        return [instruction.attribute("body") or ""]
    if instruction.opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        either = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.attributes)
        return re.findall(r"%([\w.\-]+)", branches[1]) if branches else either
    key = {"fusion": "calls", "call": "to_apply", "async-start": "calls"}.get(instruction.opcode)
    called = instruction.attribute(key) if key else None
    return [called] if called else []


def _step(body: Computation, counter: int) -> int:
    """What the body of a loop adds to its counter: 2 where the compiler put two rounds into one."""
    *_, root = body.values()
    element, step = body.get(root.operands[counter]), 0
    while element is not None and element.opcode == "add":
        terms = [body[name] for name in element.operands if name in body]
        step += sum(int(term.arguments) for term in terms if term.opcode == "constant")
        element = next((term for term in terms if term.opcode != "constant"), None)
    return max(step, 1)


def _element(computation: Computation, name: str, index: int) -> Instruction | None:
    """What a tuple holds at an index, where the computation says so; copies are looked through."""
    tuple_ = computation.get(name)
    if tuple_ is None or tuple_.opcode != "tuple":
        return None
    element = computation.get(tuple_.operands[index])
    while element is not None and element.opcode in ("copy", "bitcast"):
        element = computation.get(element.operands[0])
    return element
