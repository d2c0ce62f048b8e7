"""Which groups are in which optimizer step.

A step is addressed by its number: its groups are a pure function of the plan and the step, so a run resumes from the
step alone, on any number of processes. Nothing is kept of the groups but their number.

>>> plan = StepPlan(sizes=(5,), batch_size=2, shuffle=False)
>>> [plan.groups_of_step(step).tolist() for step in range(4)]  # an epoch is three steps, its last one smaller
[[0, 1], [2, 3], [4], [0, 1]]
>>> plan = StepPlan(sizes=(4, 2), batch_size=4, shuffle=False, weights=(0.5, 1))
>>> [plan.groups_of_step(step).tolist() for step in range(2)]  # half of the first source in every epoch, in turn
[[0, 1, 4, 5], [2, 3, 4, 5]]
"""

import dataclasses
import fractions
import functools
import itertools
import math

import grain
import numpy as np

from jaxdpo.types import InputError

SAMPLED_STEPS = 8
SAMPLED_GROUPS = 4096
MAX_WEIGHT = 1000
"""The order of an epoch is computed in int64."""


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The order of the groups of a dataset over the steps of a run.

    An epoch shows each group of a source as often as the source's weight says: once by default; with 0.5 one half of
    the groups in each epoch, in turn; with 2 each of them twice. Shuffled, every epoch has an order of its own, each
    step holds its share of every source, and a group stands twice in a step only if the share exceeds the source.
    Otherwise the order is that of the files, one source after another. Steps have `batch_size` groups; the last one of
    an epoch has what is left, and no step spans two epochs.

    Attributes:
      sizes: groups of each source, `TokenizedDataset.sizes`; a source's groups have consecutive indices.
      batch_size: groups per optimizer step.
      seed: of the shuffling, not negative.
      shuffle: whether to.
      weights: how often an epoch shows each source's groups, positive; None: once. What makes part of a group is
        rounded up.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"sizes={self.sizes}; allowed: at least one source, each of 1 group or more")
        for name, allowed in (("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < allowed:
                raise InputError(f"{name}={getattr(self, name)}; allowed: {allowed} or more")
        check_weights(self.weights, len(self.sizes))

    @property
    def groups_per_epoch(self) -> int:
        """Places of an epoch: a group that it shows twice counts twice."""
        return sum(source.quota for source in self._sources)

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(self.groups_per_epoch / self.batch_size)

    def groups_of_step(self, step: int) -> np.ndarray:
        """Indices in the dataset of the groups of an optimizer step (counted from 0): int64 `[batch_size]` or fewer."""
        epoch, within = divmod(step, self.num_steps_per_epoch)
        start = within * self.batch_size
        stop = min(start + self.batch_size, self.groups_per_epoch)
        quotas = np.array([source.quota for source in self._sources])
        sources, offsets = (_mixed if self.shuffle else _one_after_another)(quotas, start, stop)
        places = zip(sources.tolist(), offsets.tolist(), strict=True)
        return np.array([self._sources[source].group(epoch, offset) for source, offset in places], np.int64)

    def groups_of_steps(self, start: int, stop: int) -> np.ndarray:
        """int64 `[...]`: the groups that steps `start` to `stop - 1` hold, each once."""
        size, epoch = sum(self.sizes), self.num_steps_per_epoch
        if -(-start // epoch) * epoch + epoch <= stop and min(self.weights or (1,)) >= 1:
            return np.arange(size)  # a whole epoch, which shows every group
        seen = np.zeros(size, bool)
        for step in range(start, stop):
            seen[self.groups_of_step(step)] = True
            if (step + 1) % epoch == 0 and seen.all():
                break
        return np.flatnonzero(seen)

    def sampled_steps(self) -> list[np.ndarray]:
        """Groups of up to eight steps spread over the first epoch, for `choose_capacity`; whole steps if any."""
        whole = max(1, self.groups_per_epoch // self.batch_size)
        count = min(SAMPLED_STEPS, whole, max(1, SAMPLED_GROUPS // self.batch_size))
        return [self.groups_of_step(int(step)) for step in np.linspace(0, whole - 1, count)]

    @functools.cached_property
    def _sources(self) -> list["_Source"]:
        starts = itertools.accumulate(self.sizes, initial=0)
        weights = self.weights or (1,) * len(self.sizes)
        return [
            # Of a text, because the float 0.29 is less than 29 hundredths: of 100 groups it would be 28 and a bit.
            _Source(start, size, math.ceil(fractions.Fraction(str(weight)) * size), self.seed + number, self.shuffle)
            for number, (start, size, weight) in enumerate(zip(starts, self.sizes, weights, strict=False))
        ]


def check_weights(weights: tuple[float, ...] | None, sources: int) -> None:
    """InputError unless there is a weight in (0, MAX_WEIGHT] for each source, or none at all."""
    if weights is None:
        return
    if len(weights) != sources:
        raise InputError(f"{len(weights)} data weights for {sources} sources; allowed: one for each; add or drop some")
    for weight in weights:
        if not 0 < weight <= MAX_WEIGHT:
            raise InputError(
                f"data weight {weight}; allowed: a number above 0, at most {MAX_WEIGHT}; leave out the source that is "
                "not wanted"
            )


@dataclasses.dataclass(frozen=True)
class _Source:
    """The order of one source: element `(epoch, offset)`, `offset` below `quota`, is a group.

    The places of an epoch repeat with the period `size`, so equal groups are as far apart as can be. The first
    `quota % size` places of a period are a window that moves on by its length from epoch to epoch.
    """

    start: int
    """Index of its first group."""
    size: int
    """Groups."""
    quota: int
    """Groups that an epoch shows."""
    seed: int
    shuffle: bool

    def group(self, epoch: int, offset: int) -> int:
        place, window = offset % self.size, self.quota % self.size
        if place < window:
            place = self._window[epoch * window + place]
        else:
            rest = self.size - window
            place = window + self._rest[epoch * rest + place - window]
        turned = (epoch * window + place) % self.size
        return self.start + (self._turns[turned] if window else turned)

    @functools.cached_property
    def _window(self) -> grain.MapDataset:
        return self._permutations(self.quota % self.size)

    @functools.cached_property
    def _rest(self) -> grain.MapDataset:
        return self._permutations(self.size - self.quota % self.size)

    @functools.cached_property
    def _turns(self) -> grain.MapDataset:
        """The one order in which the window goes over the groups."""
        return self._permutations(self.size)

    def _permutations(self, size: int) -> grain.MapDataset:
        """Endless, by random access: element `epoch * size + i` is the i-th of that epoch."""
        numbers = grain.MapDataset.range(size).seed(self.seed)
        return (numbers.shuffle() if self.shuffle else numbers).repeat()


def _one_after_another(quotas: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and offset of places `start` to `stop - 1` of an epoch, `[stop - start]` each: source after source."""
    ends = np.cumsum(quotas)
    places = np.arange(start, stop)
    source = np.searchsorted(ends, places, side="right")
    return source, places - (ends - quotas)[source]


def _mixed(quotas: np.ndarray, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """As `_one_after_another`, but evenly mixed: sorted by `(offset + 1/2) / quota`, equal ones by source."""
    total, sources = int(quotas.sum()), len(quotas)
    # Before the place of (source, offset) stand total * (offset + 1/2) / quota others, give or take one of each source.
    lowest = np.maximum(quotas * (start - sources) // total - 1, 0)
    highest = np.minimum(quotas * (stop + sources) // total + 2, quotas)
    source = np.repeat(np.arange(sources), highest - lowest)
    offset = np.concatenate([np.arange(low, high) for low, high in zip(lowest, highest, strict=True)])
    place = np.zeros(len(offset), np.int64)
    for other, quota in enumerate(quotas):  # exact: how many of the other's offsets come first, in integers
        own = quotas[source]
        ahead = (2 * offset + 1) * quota - own  # 2 * own * (the offset that would tie)
        before = np.where(other < source, ahead // (2 * own) + 1, -(-ahead // (2 * own)))
        place += np.where(other == source, offset, np.clip(before, 0, quota))
    wanted = np.flatnonzero((start <= place) & (place < stop))
    order = wanted[np.argsort(place[wanted])]
    return source[order], offset[order]
