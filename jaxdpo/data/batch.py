"""Groups of ids, packed in rows, as the arrays of a microbatch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.data.packing import Capacity, Shape
from jaxdpo.types import UNRANKED, Batch


class Segments(NamedTuple):
    """The prompts and completions of a microbatch, in row order; int64 `[segments]` each."""

    row: np.ndarray
    group: np.ndarray
    """1-based in its row."""
    candidate: np.ndarray
    """0 for a prompt, else 1-based."""
    start: np.ndarray
    """Row index of its first token."""
    size: np.ndarray
    """Tokens."""
    position: np.ndarray
    """Position of its first token in the path: 0 for a prompt, else the prompt's size."""
    anchor: np.ndarray
    """Row index of the prompt's last token, which predicts the first token of every candidate."""
    rank: np.ndarray
    """`UNRANKED` for a prompt."""


def build_batch(dataset: TokenizedDataset, rows: Sequence[Sequence[int]], shape: Shape) -> Batch:
    """Writes groups into the arrays of one microbatch.

    Args:
      dataset: the groups.
      rows: indices in the dataset of the groups in each row, at most `shape.rows` rows; missing rows are empty.
      shape: of the microbatch.
    Returns:
      NumPy arrays that hold the invariants of `jaxdpo.types.check_batch`. Which fields there are follows from the
      dataset, so that all its batches are of one kind.
    Raises:
      ValueError: if there are more rows than the shape has, or a row overflows.
    """
    length, slots, max_groups, candidates = shape.capacity
    members = [[dataset.groups[index] for index in row] for row in rows]
    segments, ids = _segments(members)
    of_token = np.repeat(np.arange(len(segments.size)), segments.size)  # [tokens] its segment
    offset = np.arange(len(ids)) - np.repeat(np.cumsum(segments.size) - segments.size, segments.size)  # [tokens]
    scored = np.flatnonzero(segments.candidate[of_token] > 0)  # [scored tokens]
    of_slot = of_token[scored]
    slots_of_row = np.bincount(segments.row[of_slot], minlength=len(rows))
    _check_fits(segments, slots_of_row, len(rows), shape)
    slot = np.arange(len(scored)) - np.repeat(np.cumsum(slots_of_row) - slots_of_row, slots_of_row)
    index = segments.start[of_token] + offset  # [tokens] row index
    owner = (segments.group - 1) * candidates + segments.candidate - 1  # [segments]

    def per_token(values: np.ndarray) -> np.ndarray:
        out = np.zeros((shape.rows, length), np.int32)
        out[segments.row[of_token], index] = values
        return out

    def per_slot(values: np.ndarray, empty: int = 0) -> np.ndarray:
        out = np.full((shape.rows, slots), empty, np.int32)
        out[segments.row[of_slot], slot] = values
        return out

    def per_candidate(values: np.ndarray, absent: int) -> np.ndarray:
        out = np.full((shape.rows, max_groups * candidates), absent, np.int32)
        present = segments.candidate > 0
        out[segments.row[present], owner[present]] = values[present]
        return out.reshape(shape.rows, max_groups, candidates)

    def per_group(values: Sequence[Sequence[float]], absent: int, dtype: type) -> np.ndarray:
        out: np.ndarray = np.full((shape.rows, max_groups), absent, dtype)
        for row, of_groups in enumerate(values):
            out[row, : len(of_groups)] = of_groups
        return out

    return Batch(
        tokens=per_token(ids),
        positions=per_token(segments.position[of_token] + offset),
        group=per_token(segments.group[of_token]),
        candidate=per_token(segments.candidate[of_token]),
        slot_source=per_slot(np.where(offset[scored] == 0, segments.anchor[of_slot], index[scored] - 1)),
        slot_target=per_slot(ids[scored]),
        slot_owner=per_slot(owner[of_slot], empty=max_groups * candidates),
        candidate_last=per_candidate(segments.start + segments.size - 1, absent=0),
        candidate_mask=per_candidate(np.ones_like(owner), absent=0).astype(bool),
        rank=per_candidate(segments.rank, absent=UNRANKED),
        example_id=per_group(rows, -1, np.int32),
        label=_labels(members, shape) if dataset.labelled else None,
        margin=per_group([[group.margin or 0 for group in row] for row in members], 0, np.float32)
        if dataset.has_margins
        else None,
    )


def _segments(members: Sequence[Sequence[TokenizedGroup]]) -> tuple[Segments, np.ndarray]:
    """The segments of the rows, and the ids of all of them one after another."""
    table: list[tuple[int, ...]] = []
    ids = [np.zeros(0, np.int32)]
    for row, groups in enumerate(members):
        start = 0
        for number, group in enumerate(groups, start=1):
            prompt = len(group.prompt)
            anchor = start + prompt - 1
            parts = zip((group.prompt, *group.completions), (UNRANKED, *group.candidate_ranks), strict=True)
            for candidate, (part, rank) in enumerate(parts):
                table.append((row, number, candidate, start, len(part), prompt if candidate else 0, anchor, rank))
                ids.append(part)
                start += len(part)
    columns = np.array(table, np.int64).reshape(-1, len(Segments._fields))
    return Segments(*columns.T), np.concatenate(ids)


def _labels(members: Sequence[Sequence[TokenizedGroup]], shape: Shape) -> np.ndarray:
    """`Batch.label` of labelled groups: that of the first completion; a partner behind it has none of its own."""
    label = np.zeros((shape.rows, shape.capacity.groups, shape.capacity.candidates), np.float32)
    for row, groups in enumerate(members):
        label[row, : len(groups), 0] = [bool(group.label) for group in groups]
    return label


def _check_fits(segments: Segments, slots_of_row: np.ndarray, rows: int, shape: Shape) -> None:
    """Raises ValueError if the rows do not fit the shape: indexing would fail unclearly, or wrap around."""
    got = Capacity(
        length=(segments.start + segments.size).max(initial=0),
        slots=slots_of_row.max(initial=0),
        groups=segments.group.max(initial=0),
        candidates=segments.candidate.max(initial=0),
    )
    if rows > shape.rows or any(np.array(got) > shape.capacity):
        needed = Shape(Capacity(*map(int, got)), rows)
        raise ValueError(f"the rows need {needed}; allowed: {shape}; pack them with its capacity")
