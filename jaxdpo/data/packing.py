"""Groups of ids packed into rows of static shapes: pure arithmetic on lengths.

A row has three capacities: `length` (its tokens), `slots` (its scored tokens) and `groups`; a group is never split.
Packing is best-fit decreasing: the largest group first, each into the fullest row that still takes it.

>>> pack([60, 50, 40, 10], [9, 9, 9, 9], Capacity(length=100, slots=20, groups=4, candidates=2))
[[0, 2], [1, 3]]

A microbatch is some rows of one length. Microbatches of one shape leave places empty wherever a step ends before its
last one does; a layout has up to three shapes, and what is left of a step goes where it takes the least work.

>>> def shape(rows, length):
...     return Shape(Capacity(length, slots=length, groups=8, candidates=2), rows)
>>> layout = Layout((shape(2, 100), shape(1, 50)))
>>> for shape, rows in layout.divide([60, 50, 50, 40, 40, 5], slots=[9, 9, 9, 9, 9, 9]):
...     print(shape.rows, "x", shape.capacity.length, rows)
2 x 100 [[0, 3], [2, 4, 5]]
1 x 50 [[1]]
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdpo.types import InputError

MICROBATCH_WORK = 256
"""Work of one more microbatch (gradients read and written once more, a dispatch), in tokens."""
SEARCHED = 8
"""The last microbatches of a step are those whose shapes are searched for: so many of the cheapest shape at most."""
TRIED = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Combinations of shapes that are tried, by their place in the order of their work; an early one holds all, mostly."""
NOWHERE = np.iinfo(np.int64).max


class Capacity(NamedTuple):
    """What one row holds at most."""

    length: int
    """Tokens."""
    slots: int
    """Scored tokens."""
    groups: int
    """Groups."""
    candidates: int
    """Completions of any one group."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a microbatch: `rows` rows of `capacity`."""

    capacity: Capacity
    rows: int

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch, padding included."""
        return self.rows * self.capacity.length


Division = list[tuple[Shape, list[list[int]]]]
"""Microbatches: the shape of each, and the indices of the groups in each of its rows."""


class Costs(NamedTuple):
    """What a model's work goes to, in units of the work of its layers on one token, attention left out."""

    slot: float = 0.25
    """LM head of one slot: vocabulary / (12 x width x layers), 0.24 for SmolLM2-135M, 0.08 for Llama 3 8B."""
    key: float = 0.0
    """One key of one query, where attention computes whole rows: 1 / (6 x width). 0 where it skips other groups: what
    it costs then does not depend on the row."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shapes of the microbatches of a run, the longest rows first; those hold every group."""

    shapes: tuple[Shape, ...]
    costs: Costs = Costs()  # noqa: RUF009 - immutable

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of a row of each shape."""
        return tuple(shape.capacity.length for shape in self.shapes)

    def summary(self) -> str:
        """One line for people."""
        lengths, slots, groups, _ = zip(*(shape.capacity for shape in self.shapes), strict=True)
        sizes = [f"{shape.rows} rows x {length}" for shape, length in zip(self.shapes, lengths, strict=True)]
        return (
            f"microbatches of {_either(sizes)} tokens; a row takes up to {_either(slots)} scored tokens and "
            f"{_either(groups)} groups of up to {self.shapes[0].capacity.candidates} completions"
        )

    def work(self, shape: Shape) -> float:
        """Work of a microbatch, padding included, in units of the work of the model's layers on one token."""
        length, slots = shape.capacity[:2]
        row = length * (1 + length * self.costs.key) + slots * self.costs.slot
        return shape.rows * row + MICROBATCH_WORK

    def divide(self, tokens: Sequence[int] | np.ndarray, slots: Sequence[int] | np.ndarray) -> Division:
        """The microbatches of groups of these sizes; the same sizes always give the same.

        Groups that only the longest rows hold are packed into those, the others into the shape that takes the least
        work a token. Of all but the first of these microbatches it is then tried to find cheaper shapes.

        Args:
          tokens: `[groups]` row positions that each group takes.
          slots: `[groups]` scored tokens of each.
        Raises:
          InputError: if a group alone exceeds the capacity of the longest rows.
        """
        needs = np.array([tokens, slots], np.int64).reshape(2, -1)
        _check_fits(needs, self.shapes[0].capacity)
        common = (needs <= np.array(self._main.capacity[:2])[:, None]).all(axis=0)
        division: Division = []
        last: Division = []
        for shape, groups in ((self._main, np.flatnonzero(common)), (self.shapes[0], np.flatnonzero(~common))):
            rows = [groups[row].tolist() for row in pack(needs[0, groups], needs[1, groups], shape.capacity)]
            microbatches = _microbatches(shape, rows)
            division += microbatches[:-SEARCHED]
            last += microbatches[-SEARCHED:]
        return division + (self._cheaper(last, needs) if len(self.shapes) > 1 else last)

    @functools.cached_property
    def _main(self) -> Shape:
        """The shape that takes the least work a token."""
        return min(self.shapes, key=lambda shape: self.work(shape) / shape.tokens)

    def _cheaper(self, division: Division, needs: np.ndarray) -> Division:
        """The same groups in the shapes that take the least work, of those combinations that are tried."""
        groups = np.array([group for _, rows in division for row in rows for group in row], np.int64)
        needs = needs[:, groups]
        if not len(groups):
            return division
        combinations = self._combinations(needs, sum(self.work(shape) for shape, _ in division))
        for of_shapes in (combinations[place] for place in TRIED if place < len(combinations)):
            shape_of_row = [
                shape for shape, count in zip(self.shapes, of_shapes, strict=True) for _ in range(count * shape.rows)
            ]
            capacities = np.array([shape.capacity for shape in shape_of_row])  # [rows, 4]
            packed = best_fit(needs, capacities[:, :2].T, capacities[:, 2])
            if packed is not None:
                found: Division = []
                for shape in self.shapes:
                    used = [row for row, of in zip(packed, shape_of_row, strict=True) if row and of is shape]
                    found += _microbatches(shape, [groups[row].tolist() for row in used])
                return found
        return division

    def _combinations(self, needs: np.ndarray, limit: float) -> np.ndarray:
        """Numbers of microbatches of each shape that may hold these groups, by their sums: `[combinations, shapes]`.

        Args:
          needs: int64 `[2, groups]`: tokens and scored tokens of each group.
          limit: combinations of so much work are left out.
        Returns:
          The numbers, those of the least work first.
        """
        volumes = np.array([[shape.tokens, shape.rows * shape.capacity.slots] for shape in self.shapes])  # [shapes, 2]
        total, largest = needs.sum(axis=1), needs.max(axis=1)
        each = np.array([self.work(shape) for shape in self.shapes])
        most = np.minimum(np.ceil(total / volumes).max(axis=1) + 1, limit // each).astype(int)  # [shapes]
        counts = np.indices(most + 1).reshape(len(most), -1).T  # [combinations, shapes]
        holds = [(largest <= shape.capacity[:2]).all() for shape in self.shapes]
        work = counts @ each
        may = (counts @ volumes >= total).all(axis=1) & (counts[:, holds] > 0).any(axis=1) & (work < limit)
        return counts[may][np.argsort(work[may], kind="stable")]


def pack(tokens: Sequence[int] | np.ndarray, slots: Sequence[int] | np.ndarray, capacity: Capacity) -> list[list[int]]:
    """Distributes groups over rows; the same lengths always give the same rows.

    Args:
      tokens: `[groups]` row positions that each group takes.
      slots: `[groups]` scored tokens of each.
      capacity: what a row holds.
    Returns:
      The rows that are needed, each the indices of its groups.
    Raises:
      InputError: if a group alone exceeds the capacity.
    """
    needs = np.array([tokens, slots], np.int64)  # [2, groups]
    _check_fits(needs, capacity)
    size = np.array([[capacity.length], [capacity.slots]])
    rows = best_fit(needs, np.repeat(size, needs.shape[1], axis=1), np.full(needs.shape[1], capacity.groups))
    assert rows is not None  # a row for each group
    return [row for row in rows if row]


def best_fit(needs: np.ndarray, free: np.ndarray, places: np.ndarray) -> list[list[int]] | None:
    """Distributes groups over given rows, the largest first, each into the fullest row that still takes it.

    Args:
      needs: int64 `[2, groups]`: tokens and scored tokens of each.
      free: int64 `[2, rows]`: how many of them each row takes, the largest first.
      places: `[rows]`: how many groups each takes.
    Returns:
      The groups of each row, which may be none; None where a group is left over.
    """
    order = np.argsort(-(needs / free.max(axis=1, keepdims=True, initial=1)).max(axis=0), kind="stable")
    tokens, slots = free.copy()  # slots can be what fills a row
    places = places.copy()
    rows: list[list[int]] = [[] for _ in places]
    for group, (of_tokens, of_slots) in zip(order.tolist(), needs.T[order].tolist(), strict=True):
        fits = (tokens >= of_tokens) & (slots >= of_slots) & (places > 0)
        row = int(np.where(fits, tokens, NOWHERE).argmin())
        if not fits[row]:
            return None
        rows[row].append(group)
        tokens[row] -= of_tokens
        slots[row] -= of_slots
        places[row] -= 1
    return rows


def _check_fits(needs: np.ndarray, capacity: Capacity) -> None:
    for group in np.flatnonzero((needs > np.array(capacity[:2])[:, None]).any(axis=0)):
        raise InputError(
            f"group {group} needs {needs[0, group]} tokens, {needs[1, group]} of them scored; "
            f"allowed: {capacity.length} and {capacity.slots} a row; raise the row length or lower max_length"
        )


def _microbatches(shape: Shape, rows: list[list[int]]) -> Division:
    return [(shape, rows[start : start + shape.rows]) for start in range(0, len(rows), shape.rows)]


def _either(values: Sequence[Any]) -> str:
    """`1`, `1 or 2`, `1, 2 or 3`."""
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
