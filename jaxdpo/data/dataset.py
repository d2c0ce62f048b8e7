"""A tokenised dataset: its groups, what is known of all of them at once, and the records that hold none."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from jaxdpo.data.groups import GroupArrays, SourceName, StoredGroups, TokenizedGroup, arrays_of
from jaxdpo.types import UNRANKED, Origin

NAMED = 10
"""Dropped records that are named in a message; the others are counted."""


class Dropped:
    """Counts records that are left out, and remembers the first ones.

    >>> dropped = Dropped([(Origin("a.csv", 3, "row"), "a completion is empty")])
    >>> dropped.total, dropped.counts
    (1, {'a completion is empty': 1})
    >>> print(dropped.summary())
    dropped 1: row 3: a completion is empty
    """

    def __init__(self, records: Iterable[tuple[Origin, str]] = ()) -> None:
        self.counts: dict[str, int] = {}
        """Records by reason."""
        self.first: list[tuple[Origin, str]] = []
        """`(origin, reason)` of the first ones."""
        for origin, reason in records:
            self.add(origin, reason)

    def add(self, origin: Origin, reason: str) -> None:
        """Counts a record that is dropped for a reason."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.first) < NAMED:
            self.first.append((origin, reason))

    @property
    def total(self) -> int:
        """How many."""
        return sum(self.counts.values())

    def summary(self) -> str:
        """One line that counts the records and names the first ones, with their source if there are several."""
        several = len({origin.source for origin, _ in self.first}) > 1
        named = "; ".join(f"{origin if several else origin.place}: {reason}" for origin, reason in self.first)
        text = f"dropped {self.total}{': ' if named else ''}{named}"
        if self.total == len(self.first):
            return text
        reasons = sorted(self.counts.items(), key=lambda item: -item[1])[:NAMED]
        counted = ", ".join(f"{count:,} {reason}" for reason, count in reasons)
        return f"{text}; and {self.total - len(self.first):,} more, in all {counted}"


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """All groups of the data; a group's index here is its `Batch.example_id`.

    The arrays are in memory or memory-mapped: what is computed from them and kept takes 16 bytes a group.

    Attributes:
      arrays: the groups, source after source.
      sources: what `arrays.source` counts.
      dropped: the records that were left out.
    """

    arrays: GroupArrays
    sources: tuple[SourceName, ...]
    dropped: Dropped = dataclasses.field(default_factory=Dropped)

    @classmethod
    def of(cls, groups: Sequence[TokenizedGroup], dropped: Iterable[tuple[Origin, str]] = ()) -> "TokenizedDataset":
        """The dataset of these groups, in memory."""
        names = [SourceName(group.origin.source, group.origin.unit) for group in groups]
        sources = tuple(dict.fromkeys(names))
        return cls(arrays_of(groups, [sources.index(name) for name in names]), sources, Dropped(dropped))

    def __len__(self) -> int:
        return len(self.arrays.first)

    @functools.cached_property
    def groups(self) -> StoredGroups:
        """The groups in order, each made when it is asked for."""
        return StoredGroups(self.arrays, self.sources)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Groups of each source, as `StepPlan` takes them."""
        return tuple(np.bincount(self.arrays.source, minlength=len(self.sources)).tolist())

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """int32 `[groups]`: `TokenizedGroup.tokens`."""
        return self._of_groups(np.add, self.arrays.size)

    @functools.cached_property
    def slots(self) -> np.ndarray:
        """int32 `[groups]`: `TokenizedGroup.slots`."""
        return self.tokens - self.arrays.size[self.arrays.first]

    @functools.cached_property
    def longest_path(self) -> np.ndarray:
        """int32 `[groups]`: `TokenizedGroup.longest_path`."""
        prompts = self.arrays.size[self.arrays.first]
        of_completions = np.array(self.arrays.size)
        of_completions[self.arrays.first] = 0
        return prompts + self._of_groups(np.maximum, of_completions)

    @functools.cached_property
    def largest_id(self) -> np.ndarray:
        """int32 `[groups]`: the largest id of prompt and completions."""
        return self._of_groups(np.maximum, self.arrays.largest)

    @property
    def labelled(self) -> bool:
        """Whether completions are judged one by one; otherwise they are compared, or imitated."""
        return bool((self.arrays.label[:1] >= 0).any())

    @functools.cached_property
    def has_ranks(self) -> bool:
        """Whether any group has completions that tie or are not ranked."""
        return bool(self.arrays.ranked.any())

    @functools.cached_property
    def has_margins(self) -> bool:
        """Whether any group has a stated margin."""
        return bool(np.isfinite(self.arrays.margin).any())

    @functools.cached_property
    def singles(self) -> np.ndarray:
        """int `[...]`: the groups of one completion, which compare nothing."""
        return np.flatnonzero(self.arrays.completions == 1)

    @functools.cached_property
    def candidates(self) -> int:
        """Completions of the group that has most."""
        return int(self.arrays.completions.max(initial=0))

    @functools.cached_property
    def truncated_prompts(self) -> int:
        """Prompts that lost their beginning."""
        return int(self.arrays.truncated[self.arrays.first].sum())

    @functools.cached_property
    def truncated_completions(self) -> int:
        """Completions that lost their end."""
        return int(self.arrays.truncated.sum()) - self.truncated_prompts

    def completion_lengths(self) -> np.ndarray:
        """int32 `[groups, candidates]` tokens of each completion; 0 where absent."""
        return self._of_candidates(self.arrays.size, absent=0)

    def ranks(self) -> np.ndarray:
        """int32 `[groups, candidates]`: `Batch.rank` of all groups."""
        return self._of_candidates(self.arrays.rank, absent=UNRANKED)

    def labels(self) -> np.ndarray | None:
        """float32 `[groups, candidates]`: `Batch.label` of all groups."""
        if not self.labelled:
            return None
        label = np.zeros((len(self), self.candidates), np.float32)
        label[:, 0] = self.arrays.label
        return label

    def margins(self) -> np.ndarray | None:
        """float32 `[groups]`: `Batch.margin` of all groups."""
        return np.nan_to_num(self.arrays.margin).astype(np.float32) if self.has_margins else None

    def summary(self) -> str:
        """One line: groups, tokens, what was cut and which records were dropped."""
        good = f"{int((self.arrays.label == 1).sum()):,} of them good, " if self.labelled else ""
        return (
            f"{len(self)} groups, {good}{self.tokens.sum(dtype=np.int64):,} tokens of which "
            f"{self.slots.sum(dtype=np.int64):,} are scored, "
            f"{self.truncated_prompts} prompts lost their beginning, "
            f"{self.truncated_completions} completions lost their end, {self.dropped.summary()}"
        )

    def _of_groups(self, reduce: np.ufunc, of_segments: np.ndarray) -> np.ndarray:
        """A value of each group from those of its segments; the segments of a group stand side by side."""
        return reduce.reduceat(of_segments, self.arrays.first, dtype=np.int32) if len(self) else np.zeros(0, np.int32)

    def _of_candidates(self, of_segments: np.ndarray, *, absent: int) -> np.ndarray:
        """`[groups, candidates]` from a value of each segment."""
        present = np.arange(self.candidates) < self.arrays.completions[:, None]
        completion = np.ones(len(of_segments), bool)
        completion[self.arrays.first] = False
        out = np.full(present.shape, absent, np.int32)
        out[present] = of_segments[completion]
        return out
