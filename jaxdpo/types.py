"""What flows through jaxdpo: a `Preference` of text, a `Batch` of preference trees, and the error for bad input.

A batch is `rows x groups x candidates`. A group is one prompt with its ranked completions, best first. The prompt's
tokens stand in the row once; every candidate follows it and sees the prompt and itself, never a sibling. Several
groups share a row. Pairs are two candidates, rankings are ragged.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import numpy as np

Array = Any  # numpy.ndarray or jax.Array: a Batch is built by NumPy and consumed by jax

PADDING = 0
"""Value of `Batch.group` where the row holds no token."""
UNRANKED = np.iinfo(np.int32).max
"""Value of `Batch.rank` for a candidate that is absent or below the observed top k."""


class InputError(ValueError):
    """Input that cannot be used as it is; the message says what, got, allowed and fix."""


class RunStopped(RuntimeError):
    """A run that must not go on; the message says at which step, why, and what to do."""


class RunInterrupted(RunStopped):
    """A run that a signal ended after a step, which is saved: giving the same command again goes on from there."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
        """Number of the signal: 2 for Ctrl-C, 15 for SIGTERM."""


class Origin(NamedTuple):
    """Where a record came from.

    >>> str(Origin("sums.jsonl", 7)), str(Origin("sums.parquet", 6, "row"))
    ('sums.jsonl, line 7', 'sums.parquet, row 6')
    """

    source: str
    """The file or data set, as the user named it."""
    number: int
    """Its line, from 1, or its row, from 0."""
    unit: Literal["line", "row"] = "line"
    """What `number` counts: lines of a text file with one record each, otherwise rows."""

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"

    @property
    def place(self) -> str:
        """Where in its source; a line is named as a row too, counted from 0: blank lines count."""
        return f"row {self.number}" if self.unit == "row" else f"row {self.number - 1} (line {self.number})"


@dataclasses.dataclass(frozen=True)
class Preference:
    """One prompt and its completions as text, best first.

    Attributes:
      prompt: text before the completion, may be empty.
      completions: at least one text, best first.
      origin: the record it was made from, for messages.
      ranks: of each completion, not falling: 0 is best, equal values tie, `UNRANKED` is below the observed top k. None:
        0, 1, 2 and so on.
      label: whether a single completion is a good one; None where completions are compared or imitated.
      margin: by how much the better of two completions should be rewarded above the other; None where not stated.
      templated: whether a chat template has written the texts, its special tokens included: none is added to them.
    """

    prompt: str
    completions: tuple[str, ...]
    origin: Origin
    ranks: tuple[int, ...] | None = None
    label: bool | None = None
    margin: float | None = None
    templated: bool = False

    def __post_init__(self) -> None:
        count, where = len(self.completions), self.origin
        if self.ranks is not None and (len(self.ranks) != count or list(self.ranks) != sorted(self.ranks)):
            raise InputError(
                f"{where}: ranks={self.ranks} of {count} completions; allowed: one for each, not falling; sort the "
                "completions best first"
            )
        if self.label is not None and count != 1:
            raise InputError(
                f"{where}: label={self.label} of {count} completions; allowed: a label for a single completion; "
                "make one preference of each, or drop the label"
            )
        if self.margin is not None and (count != 2 or not math.isfinite(self.margin)):
            raise InputError(
                f"{where}: margin={self.margin} of {count} completions; allowed: a finite margin of two; correct "
                "it, or drop the margin"
            )


class Batch(NamedTuple):
    """Preference trees packed in rows of one static shape; all fields are arrays, int32 unless said otherwise."""

    tokens: Array
    """`[rows, length]` token ids; 0 where `group` is 0."""
    positions: Array
    """`[rows, length]` position in its path (prompt + one completion); restarts at the prompt's end per candidate."""
    group: Array
    """`[rows, length]` 0 padding, else 1-based group of the row."""
    candidate: Array
    """`[rows, length]` 0 prompt (shared), else 1-based candidate of its group."""
    slot_source: Array
    """`[rows, slots]` row index of the hidden state that predicts this slot's token."""
    slot_target: Array
    """`[rows, slots]` the token it must predict."""
    slot_owner: Array
    """`[rows, slots]` `(group-1)*candidates + candidate-1`; `groups*candidates` marks an empty slot."""
    candidate_last: Array
    """`[rows, groups, candidates]` row index of the candidate's last token (EOS included); 0 where absent."""
    candidate_mask: Array
    """bool `[rows, groups, candidates]` which candidates exist."""
    rank: Array
    """`[rows, groups, candidates]` 0 is best, equal values tie, `UNRANKED` is below the observed top k or absent."""
    example_id: Array
    """`[rows, groups]` index of the group in its dataset, -1 for an empty group."""
    label: Array | None = None
    """float32 `[rows, groups, candidates]` 1 for a good completion, 0 for a bad one (and where absent); None for data
    that compares completions. A labelled group is a completion and, for KTO, one that belongs to another prompt."""
    margin: Array | None = None
    """float32 `[rows, groups]` by how much the first candidate should be rewarded above the second, 0 where not stated
    and for an empty group; None for data that states none."""

    @property
    def group_mask(self) -> Array:
        """bool `[rows, groups]`: which groups exist."""
        return self.candidate_mask.any(axis=-1)


def check_batch(batch: Batch) -> None:
    """Raises ValueError, naming field and row, where a host-side batch breaks the contract of `Batch`."""
    rows, length = batch.tokens.shape
    groups, candidates = batch.candidate_mask.shape[1:]
    empty = groups * candidates

    def require(holds: np.ndarray, what: str) -> None:
        if not np.all(holds):
            row = int(np.argwhere(~np.asarray(holds))[0][0])
            raise ValueError(f"Batch row {row}: {what}")

    for name in ("positions", "group", "candidate"):
        if getattr(batch, name).shape != (rows, length):
            raise ValueError(f"Batch.{name} has shape {getattr(batch, name).shape}; allowed: {(rows, length)}")
    label = np.zeros(batch.candidate_mask.shape, np.float32) if batch.label is None else batch.label
    if label.shape != batch.candidate_mask.shape or label.dtype != np.float32:
        raise ValueError(
            f"Batch.label is {label.dtype} of shape {label.shape}; allowed: float32 {batch.candidate_mask.shape}"
        )
    margin = np.zeros((rows, groups), np.float32) if batch.margin is None else batch.margin
    if margin.shape != (rows, groups) or margin.dtype != np.float32:
        raise ValueError(f"Batch.margin is {margin.dtype} of shape {margin.shape}; allowed: float32 {(rows, groups)}")
    scored = batch.slot_owner < empty
    source = np.take_along_axis(batch.group, batch.slot_source, axis=1)
    owner_group = np.where(scored, batch.slot_owner // candidates + 1, 0)
    owner_candidate = np.where(scored, batch.slot_owner % candidates + 1, 0)
    source_candidate = np.take_along_axis(batch.candidate, batch.slot_source, axis=1)
    last_group = np.take_along_axis(batch.group, batch.candidate_last.reshape(rows, -1), axis=1)
    expected_group = np.repeat(np.arange(1, groups + 1), candidates)[None]
    mask = batch.candidate_mask.reshape(rows, -1)
    require((batch.group >= 0) & (batch.group <= groups), f"group outside 0..{groups}")
    require((batch.group != PADDING) | (batch.tokens == 0), "padding holds a token other than 0")
    require((batch.group != PADDING) | (batch.candidate == 0), "padding belongs to a candidate")
    require((batch.slot_owner >= 0) & (batch.slot_owner <= empty), f"slot_owner outside 0..{empty}")
    require(~scored | (source == owner_group), "a slot is predicted from another group's token")
    require(
        ~scored | (source_candidate == 0) | (source_candidate == owner_candidate),
        "a slot is predicted from a sibling candidate's token",
    )
    require(~mask | (last_group == expected_group), "candidate_last points outside its group")
    require((batch.example_id >= 0) == batch.group_mask, "example_id and candidate_mask disagree on which groups exist")
    require((batch.rank != UNRANKED) <= batch.candidate_mask, "an absent candidate has a rank")
    require(batch.rank[..., 1:] >= batch.rank[..., :-1], "candidates do not stand best first")
    require((label == 0) | (label == 1), "a label is neither 0 nor 1")
    require((label == 0) | (np.arange(candidates) == 0), "a label is not that of a group's first candidate")
    require((label == 0) | batch.candidate_mask, "an absent candidate has a label")
    require(
        np.isfinite(margin) & ((margin == 0) | batch.group_mask), "an empty group has a margin, or one is not finite"
    )
    partners = batch.candidate_mask[..., 1:] & (batch.label is not None)
    require(~partners | (batch.rank[..., 1:] == UNRANKED), "the partner of a labelled completion has a rank")
