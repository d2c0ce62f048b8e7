"""Which shape the microbatches of a run get: chosen from the data, by packing sampled steps in many shapes.

One layout serves a whole run, so that every program is compiled once. It follows from the data and the first epoch's
order alone: a run that is made longer keeps it.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import Capacity, Layout, pack
from jaxdpo.types import PADDING, Batch, InputError

LENGTH_MULTIPLE = 64
"""Row lengths and slots are multiples of it: whole vectors on every backend."""
LONGEST_ROW = 4
"""Rows are tried up to so many times the length of the largest group."""
LENGTHS_TRIED = 13
GROUPS_MULTIPLE = 4
SHORT_GROUP = 0.05
"""A row takes as many groups as it can hold of this quantile of lengths: places for groups cost next to nothing."""
SLOT_SHARES = (1.0, 1.1, 1.25, 1.5)
"""Slots per row that are tried, relative to the data's own share of scored tokens."""
SLOT_COST = 0.25
"""Work of a slot's LM head in units of a token's work in the layers: vocabulary / (12 x width x layers), 0.24 for
SmolLM2-135M, 0.45 for GPT-2, 0.08 for Llama 3 8B."""
ATTENTION_LENGTH = 4096
"""Row length at which dense attention doubles a token's work in the layers: 6 x width, 3456 for SmolLM2-135M."""
MICROBATCH_COST = 256
"""Work of one more microbatch (gradients read and written once more, a dispatch), in tokens."""


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
    row_length: int | None = None,
) -> Layout:
    """The layout that spends least on a sample of steps.

    Args:
      datasets: the one that is trained on, then others whose groups must fit too.
      steps: indices in the first dataset of the groups of sampled steps, `StepPlan.sampled_steps()`.
      max_microbatch_tokens: bound on rows x length, which bounds the memory of a microbatch. `row_multiple` rows of the
        largest group's length are always allowed, because nothing smaller holds it.
      row_multiple: rows are a multiple of it: the devices that rows are split over.
      row_length: the length to use instead of trying several.
    Raises:
      InputError: if `row_length` is shorter than the largest group needs; with the group's file and line.
    """
    needs = Capacity(
        length=max(int(dataset.tokens.max()) for dataset in datasets),
        slots=max(int(dataset.slots.max()) for dataset in datasets),
        groups=1,
        candidates=max(dataset.candidates for dataset in datasets),
    )
    if row_length is None:
        lengths = _lengths(needs.length, max_microbatch_tokens // row_multiple)
    else:
        lengths = [row_length]
        _check_length(datasets, row_length)
    train = datasets[0]
    scored_share = train.slots.sum(dtype=np.int64) / train.tokens.sum(dtype=np.int64)
    tried: list[tuple[float, Layout]] = []
    for length, share in itertools.product(lengths, SLOT_SHARES):
        slots = _round_up(max(needs.slots, share * scored_share * length), LENGTH_MULTIPLE)
        groups = _round_up(length / np.quantile(train.tokens, SHORT_GROUP), GROUPS_MULTIPLE)
        capacity = needs._replace(length=length, slots=min(slots, length), groups=groups)
        packed = [pack(train.tokens[step], train.slots[step], capacity) for step in steps]
        most = min(max_microbatch_tokens // length, max(map(len, packed)) + row_multiple - 1)
        for rows in range(row_multiple, max(most, row_multiple) + 1, row_multiple):
            layout = Layout(capacity, rows)
            tried.append((sum(_work(layout, len(step)) for step in packed), layout))
    return min(tried, key=lambda item: item[0])[1]


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


def _lengths(needed: int, limit: int) -> list[int]:
    """Row lengths to try: the shortest that holds every group, and longer ones up to `limit`."""
    shortest = _round_up(needed, LENGTH_MULTIPLE)
    tried = {_round_up(n, LENGTH_MULTIPLE) for n in np.linspace(shortest, LONGEST_ROW * shortest, LENGTHS_TRIED)}
    return sorted(length for length in tried if length <= max(limit, shortest))


def _work(layout: Layout, rows: int) -> float:
    """Work of a step that needs so many rows, in units of one token's work in the layers."""
    length, slots = layout.capacity[:2]
    row = length * (1 + length / ATTENTION_LENGTH) + slots * SLOT_COST
    return math.ceil(rows / layout.rows) * (layout.rows * row + MICROBATCH_COST)


def _check_length(datasets: Sequence[TokenizedDataset], length: int) -> None:
    for dataset in datasets:
        largest = int(dataset.tokens.argmax())
        if dataset.tokens[largest] > length:
            group = dataset.groups[largest]
            raise InputError(
                f"{group.origin}: the prompt and its {len(group.completions)} completions need "
                f"{group.tokens} tokens; allowed: row_length={length}; raise row_length or lower max_length"
            )


def _round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple
