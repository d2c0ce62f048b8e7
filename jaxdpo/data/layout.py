"""Which shapes the microbatches of a run get: chosen from the data, by packing sampled steps in many shapes.

Up to three row lengths serve a run, and every program is compiled once for each. They follow from the data and the
first epoch's order alone: a run that is made longer keeps them.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxdpo.config.run import MAX_ROW_LENGTHS
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import Capacity, Costs, Layout, Shape, pack
from jaxdpo.types import PADDING, Batch, InputError

LENGTH_MULTIPLE = 64
"""Row lengths and slots are multiples of it: whole vectors on every backend."""
LONGEST_ROW = 4
"""Rows are tried up to so many times the length of the largest group."""
LENGTHS_TRIED = 13
FURTHER_LENGTHS = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.125, 1.25, 1.5)
"""A further row length is looked for among these multiples of the longest one there is."""
ROW_SHARES = (0.01, 0.125, 0.25, 0.5, 0.75, 1.0)
"""Rows of a microbatch that are tried where there are several lengths, in those that the bound allows."""
GROUPS_MULTIPLE = 4
SHORT_GROUP = 0.05
"""A row takes as many groups as it can hold of this quantile of lengths: places for groups cost next to nothing."""
SLOT_SHARES = (1.0, 1.1, 1.25, 1.5)
"""Slots per row that are tried, relative to the data's own share of scored tokens."""
COMPILATION = 4096
"""Tokens' work that a further row length has to save an epoch: the compilation of its programs takes seconds, and only
once, because they are kept on disk."""


class Fill(NamedTuple):
    """How much of what is computed is data."""

    length: float
    """Share of the row positions that hold a token."""
    slots: float
    """Share of the slots that are scored."""
    rows: int
    """Rows, empty ones included."""
    empty_rows: int
    """Rows without a group, which fill the last microbatch of a step up."""

    def summary(self) -> str:
        """One line for people."""
        return (
            f"fill {self.length:.1%} of length, {self.slots:.1%} of slots; {self.empty_rows} of {self.rows} rows empty"
        )


def choose_capacity(
    datasets: Sequence[TokenizedDataset],
    steps: Sequence[np.ndarray],
    *,
    max_microbatch_tokens: int,
    row_multiple: int = 1,
    length_multiple: int = 1,
    row_lengths: Sequence[int] | None = None,
    costs: Costs = Costs(),  # noqa: B008 - immutable
) -> Layout:
    """The layout that spends least on a sample of steps.

    Args:
      datasets: the one that is trained on, then others whose groups must fit too.
      steps: indices in the first dataset of the groups of sampled steps, `StepPlan.sampled_steps()`.
      max_microbatch_tokens: bound on rows x length, which bounds the memory of a microbatch. `row_multiple` rows of the
        largest group's length are always allowed, because nothing smaller holds it.
      row_multiple: rows are a multiple of it: the devices that rows are split over.
      length_multiple: row lengths are a multiple of it, because devices share a row.
      row_lengths: one to three lengths to use instead of trying several.
      costs: what the model's work goes to.
    Raises:
      InputError: if all `row_lengths` are shorter than the largest group needs, with the group's file and line; or one
        is not a multiple of `length_multiple`.
    """
    needs = Capacity(
        length=max(int(dataset.tokens.max()) for dataset in datasets),
        slots=max(int(dataset.slots.max()) for dataset in datasets),
        groups=1,
        candidates=max(dataset.candidates for dataset in datasets),
    )
    multiple = math.lcm(LENGTH_MULTIPLE, length_multiple)
    trial = _Trial(datasets[0], steps, needs, max_microbatch_tokens, row_multiple, multiple, costs)
    if row_lengths is not None:
        _check_lengths(datasets, row_lengths, length_multiple)
        return trial.layout(row_lengths)
    best = min((trial.layout([length]) for length in trial.lengths()), key=trial.work)
    while len(best.shapes) < MAX_ROW_LENGTHS:
        longer = min(
            (trial.layout([*best.row_lengths, length]) for length in trial.further(best)), key=trial.work, default=best
        )
        if trial.work(longer) >= trial.work(best):
            break
        best = longer
    return best


class LargestRow(NamedTuple):
    """The longest row that a layout has to have."""

    length: int
    """Tokens."""
    reason: str
    """Who needs it, for messages: the end of a sentence about the row."""


def largest_row(datasets: Sequence[TokenizedDataset], row_lengths: Sequence[int] | None = None) -> LargestRow:
    """The row that holds the largest group, or the longest of the lengths that are given."""
    if row_lengths is not None:
        return LargestRow(max(row_lengths), "--row-lengths asks for")
    dataset = max(datasets, key=lambda dataset: int(dataset.tokens.max()))
    group = dataset.groups[int(dataset.tokens.argmax())]
    length = _round_up(group.tokens, LENGTH_MULTIPLE)
    return LargestRow(length, f"the largest group needs ({group.tokens} tokens; {group.origin})")


def fill_of(batches: Iterable[Batch]) -> Fill:
    """Measures how well microbatches are filled."""
    rows = empty_rows = positions = tokens = slots = scored = 0
    for batch in batches:
        groups, candidates = batch.candidate_mask.shape[1:]
        rows += len(batch.tokens)
        empty_rows += int((~batch.group_mask.any(axis=-1)).sum())
        positions += batch.group.size
        tokens += int((batch.group != PADDING).sum())
        slots += batch.slot_owner.size
        scored += int((batch.slot_owner < groups * candidates).sum())
    return Fill(tokens / max(positions, 1), scored / max(slots, 1), rows, empty_rows)


@dataclasses.dataclass(frozen=True)
class _Trial:
    """Layouts tried on sampled steps."""

    train: TokenizedDataset
    steps: Sequence[np.ndarray]
    needs: Capacity
    """What the longest rows have to hold."""
    max_tokens: int
    row_multiple: int
    length_multiple: int
    costs: Costs

    def lengths(self) -> list[int]:
        """Row lengths to try alone: the shortest that holds every group, and longer ones within the bound."""
        shortest = _round_up(self.needs.length, self.length_multiple)
        even = np.linspace(shortest, LONGEST_ROW * shortest, LENGTHS_TRIED)
        tried = {_round_up(length, self.length_multiple) for length in even}
        return sorted(length for length in tried if length <= max(self.max_tokens // self.row_multiple, shortest))

    def further(self, layout: Layout) -> list[int]:
        """Row lengths to try besides those of a layout."""
        tried = {_round_up(share * layout.row_lengths[0], self.length_multiple) for share in FURTHER_LENGTHS}
        fitting = (length for length in tried if length * self.row_multiple <= self.max_tokens)
        return sorted(set(fitting) - set(layout.row_lengths))

    def work(self, layout: Layout) -> float:
        """Work of an epoch, and of the compilation of the further lengths."""
        divided = [layout.divide(self.train.tokens[step], self.train.slots[step]) for step in self.steps]
        of_sample = sum(layout.work(shape) for step in divided for shape, _ in step)
        epoch = len(self.train) / max(1, sum(map(len, self.steps)))
        return of_sample * epoch + COMPILATION * (len(layout.shapes) - 1)

    def layout(self, lengths: Sequence[int]) -> Layout:
        """The layout of these row lengths that spends least: the rows and slots of each are chosen."""
        longest, *others = sorted(lengths, reverse=True)
        shapes = [min(self._alone(longest), key=lambda item: item[0])[1]]
        for length in others:
            capacity = self._capacity(length, length * shapes[0].capacity.slots / longest)
            shapes = self._best(shapes, [Shape(capacity, rows) for rows in self._rows(length)])
        if others:
            shapes = self._best(shapes[1:], [dataclasses.replace(shapes[0], rows=rows) for rows in self._rows(longest)])
        return Layout(tuple(shapes), self.costs)

    def _alone(self, length: int) -> Iterator[tuple[float, Shape]]:
        """Shapes with rows of this length, and the work of the sample where it is alone."""
        scored = self.train.slots.sum(dtype=np.int64) / self.train.tokens.sum(dtype=np.int64)
        for share in SLOT_SHARES:
            capacity = self._capacity(length, max(self.needs.slots, share * scored * length))
            rows = [len(pack(self.train.tokens[step], self.train.slots[step], capacity)) for step in self.steps]
            most = min(self.max_tokens // length, max(rows) + self.row_multiple - 1)
            for each in range(self.row_multiple, max(most, self.row_multiple) + 1, self.row_multiple):
                shape = Shape(capacity, each)
                yield sum(math.ceil(n / each) for n in rows) * Layout((shape,), self.costs).work(shape), shape

    def _capacity(self, length: int, slots: float) -> Capacity:
        groups = _round_up(length / np.quantile(self.train.tokens, SHORT_GROUP), GROUPS_MULTIPLE)
        slots = min(_round_up(slots, LENGTH_MULTIPLE), length)
        return self.needs._replace(length=length, slots=slots, groups=groups)

    def _rows(self, length: int) -> list[int]:
        """Rows of a microbatch to try."""
        largest = max(int(self.train.tokens[step].sum(dtype=np.int64)) for step in self.steps)
        most = max(1, min(self.max_tokens // length, math.ceil(largest / length)) // self.row_multiple)
        return sorted({self.row_multiple * math.ceil(share * most) for share in ROW_SHARES})

    def _best(self, shapes: list[Shape], options: list[Shape]) -> list[Shape]:
        """Shapes and the one of the options with which they spend least, the longest rows first."""
        best, least = None, math.inf
        for option in options:
            layout = Layout(tuple(sorted([*shapes, option], key=lambda shape: -shape.capacity.length)), self.costs)
            if (work := self.work(layout)) < least:
                best, least = layout, work
        assert best is not None  # there is an option
        return list(best.shapes)


def _check_lengths(datasets: Sequence[TokenizedDataset], lengths: Sequence[int], multiple: int) -> None:
    if any(length % multiple for length in lengths):
        raise InputError(
            f"row_lengths={list(lengths)}; allowed: multiples of {multiple}, because devices share the length of a row"
        )
    if not 1 <= len(set(lengths)) == len(lengths) <= MAX_ROW_LENGTHS:
        raise InputError(f"row_lengths={list(lengths)}; allowed: one to {MAX_ROW_LENGTHS}, each once")
    for dataset in datasets:
        largest = int(dataset.tokens.argmax())
        if dataset.tokens[largest] > max(lengths):
            group = dataset.groups[largest]
            raise InputError(
                f"{group.origin}: the prompt and its {len(group.completions)} completions need {group.tokens} tokens; "
                f"allowed: {max(lengths)}, the longest of row_lengths; raise it or lower max_length"
            )


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
