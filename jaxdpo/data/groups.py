"""Groups of ids as a struct of arrays: the same in memory and memory-mapped from files, of any size.

A segment is a prompt or a completion. The segments of a group stand one after another, the prompt first, and each
names its ids by start and size, so two segments may share ids.

>>> prompt, chosen, rejected = (np.array(ids, np.int32) for ids in ([5, 6], [7, 1], [8]))
>>> group = TokenizedGroup(prompt, (chosen, rejected), False, (False, True), Origin("a.jsonl", 3))
>>> arrays = arrays_of([group, group], [0, 0])
>>> arrays.ids.tolist(), arrays.start.tolist(), arrays.size.tolist(), arrays.first.tolist()
([5, 6, 7, 1, 8, 5, 6, 7, 1, 8], [0, 2, 4, 5, 7, 9], [2, 2, 1, 2, 2, 1], [0, 3])
>>> StoredGroups(arrays, [SourceName("a.jsonl", "line")])[1].completions_truncated
(False, True)
"""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import numpy as np

from jaxdpo.types import UNRANKED, Origin


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedGroup:
    """One prompt and its completions as ids, best first; every path fits `max_length`.

    Attributes:
      prompt: int32 `[prompt tokens]`, at least one.
      completions: int32 `[completion tokens]` each, at least one; EOS included where the end was not cut off.
      prompt_truncated: the prompt lost its beginning.
      completions_truncated: which completions lost their end.
      origin: as `Preference.origin`.
      ranks: as `Preference.ranks`.
      label: as `Preference.label`.
      margin: as `Preference.margin`.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    prompt_truncated: bool
    completions_truncated: tuple[bool, ...]
    origin: Origin
    ranks: tuple[int, ...] | None = None
    label: bool | None = None
    margin: float | None = None

    @property
    def candidate_ranks(self) -> tuple[int, ...]:
        """`Batch.rank` of each completion. Behind a labelled one stands at most its partner, which is not ranked."""
        if self.ranks is not None:
            return self.ranks
        places = range(len(self.completions))
        return tuple(places) if self.label is None else tuple(place and UNRANKED for place in places)

    @property
    def slots(self) -> int:
        """Scored tokens: those of all completions."""
        return sum(map(len, self.completions))

    @property
    def tokens(self) -> int:
        """Row positions that it takes: the prompt once, and all completions."""
        return len(self.prompt) + self.slots

    @property
    def longest_path(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


class SourceName(NamedTuple):
    """What `Origin` says of every record of one source."""

    source: str
    unit: Literal["line", "row"]


class GroupArrays(NamedTuple):
    """Groups one after another: `[ids]`, then what is known of each of `[segments]`, then of each of `[groups]`."""

    ids: np.ndarray
    """int32 `[ids]` of all segments."""
    start: np.ndarray
    """int64 `[segments]` index in `ids` of its first one."""
    size: np.ndarray
    """int32 `[segments]` how many."""
    truncated: np.ndarray
    """bool `[segments]` a prompt that lost its beginning, a completion that lost its end."""
    rank: np.ndarray
    """int32 `[segments]` `TokenizedGroup.candidate_ranks`; `UNRANKED` for a prompt."""
    largest: np.ndarray
    """int32 `[segments]` its largest id, or that of the segment it is a part of."""
    first: np.ndarray
    """int64 `[groups]` index in the segments of its prompt; its completions follow."""
    completions: np.ndarray
    """int32 `[groups]` how many."""
    ranked: np.ndarray
    """bool `[groups]` whether its ranks are stated: some tie, or are not observed."""
    label: np.ndarray
    """int8 `[groups]` 1 good, 0 bad, -1 without label."""
    margin: np.ndarray
    """float64 `[groups]` NaN where not stated."""
    source: np.ndarray
    """int32 `[groups]` which of the sources it came from."""
    number: np.ndarray
    """int64 `[groups]` `Origin.number`."""


DTYPES = dict(
    zip(
        GroupArrays._fields,
        ("<i4", "<i8", "<i4", "|b1", "<i4", "<i4", "<i8", "<i4", "|b1", "|i1", "<f8", "<i4", "<i8"),
        strict=True,
    )
)
"""Of each array, in memory and on disk."""


def arrays_of(groups: Sequence[TokenizedGroup], sources: Sequence[int]) -> GroupArrays:
    """Groups as arrays, copied.

    Args:
      groups: in order.
      sources: `GroupArrays.source` of each.
    """
    parts = [part for group in groups for part in (group.prompt, *group.completions)]
    size = np.array([len(part) for part in parts], np.int64)
    start = np.cumsum(size) - size
    ids = np.concatenate([np.zeros(0, np.int32), *parts])
    count = np.array([len(group.completions) for group in groups], np.int64)
    columns = GroupArrays(
        ids=ids,
        start=start,
        size=size,
        truncated=np.array([t for group in groups for t in (group.prompt_truncated, *group.completions_truncated)]),
        rank=np.array([rank for group in groups for rank in (UNRANKED, *group.candidate_ranks)]),
        largest=np.maximum.reduceat(ids, start) if parts else ids,
        first=np.cumsum(count + 1) - (count + 1),
        completions=count,
        ranked=np.array([group.ranks is not None for group in groups]),
        label=np.array([-1 if group.label is None else group.label for group in groups]),
        margin=np.array([np.nan if group.margin is None else group.margin for group in groups]),
        source=np.array(sources),
        number=np.array([group.origin.number for group in groups]),
    )
    return GroupArrays(*(np.asarray(column, DTYPES[name]) for name, column in columns._asdict().items()))


class StoredGroups(Sequence[TokenizedGroup]):
    """The groups in arrays, each made when it is asked for; its ids are a view."""

    def __init__(self, arrays: GroupArrays, sources: Sequence[SourceName]) -> None:
        self._arrays, self._sources = arrays, sources

    def __len__(self) -> int:
        return len(self._arrays.first)

    @overload
    def __getitem__(self, index: int) -> TokenizedGroup: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedGroup]: ...
    def __getitem__(self, index: int | slice) -> TokenizedGroup | list[TokenizedGroup]:
        if isinstance(index, slice):
            return [self._group(i) for i in range(*index.indices(len(self)))]
        place = operator.index(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"group {place} of {len(self)}")
        return self._group(place % len(self))

    def origin(self, index: int) -> Origin:
        """Where a group came from."""
        source, unit = self._sources[self._arrays.source[index]]
        return Origin(source, int(self._arrays.number[index]), unit)

    def _group(self, index: int) -> TokenizedGroup:
        arrays = self._arrays
        first = int(arrays.first[index])
        segments = slice(first, first + 1 + int(arrays.completions[index]))
        spans = zip(arrays.start[segments].tolist(), arrays.size[segments].tolist(), strict=True)
        prompt, *completions = (arrays.ids[start : start + size] for start, size in spans)
        prompt_truncated, *completions_truncated = arrays.truncated[segments].tolist()
        label, margin = int(arrays.label[index]), float(arrays.margin[index])
        return TokenizedGroup(
            prompt=prompt,
            completions=tuple(completions),
            prompt_truncated=prompt_truncated,
            completions_truncated=tuple(completions_truncated),
            origin=self.origin(index),
            ranks=tuple(arrays.rank[segments][1:].tolist()) if arrays.ranked[index] else None,
            label=None if label < 0 else bool(label),
            margin=None if np.isnan(margin) else margin,
        )
