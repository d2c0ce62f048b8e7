"""Which groups are in which optimizer step, and the microbatches they make.

A step is addressed by its number: its groups are a pure function of `(groups, batch_size, seed, shuffle, step)`, so a
run resumes from the step alone, on any number of processes.

>>> plan = StepPlan(groups=5, batch_size=2, seed=0, shuffle=False)
>>> [plan.groups_of_step(step).tolist() for step in range(4)]  # an epoch is three steps, its last one smaller
[[0, 1], [2, 3], [4], [0, 1]]
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxdpo.data.packing import Layout, build_batch, pack
from jaxdpo.data.tokenize import TokenizedDataset
from jaxdpo.types import Batch, InputError

PREFETCHED_STEPS = 4
PACKED_TOGETHER = 1024
"""Groups that `all_batches` packs at a time: enough to fill rows well; the time of packing grows with its square."""
SAMPLED_STEPS = 8
SAMPLED_GROUPS = 4096


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """The order of the groups of a dataset over the steps of a run.

    Every epoch holds each group once, in an order of its own where shuffled and in file order otherwise. Steps have
    `batch_size` groups; the last one of an epoch has what is left, and no step spans two epochs.

    Attributes:
      groups: size of the dataset.
      batch_size: groups per optimizer step.
      seed: of the shuffling, not negative.
      shuffle: whether to.
    """

    groups: int
    batch_size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("groups", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < allowed:
                raise InputError(f"{name}={getattr(self, name)}; allowed: {allowed} or more")

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps that see every group once."""
        return math.ceil(self.groups / self.batch_size)

    def groups_of_step(self, step: int) -> np.ndarray:
        """Indices in the dataset of the groups of an optimizer step (counted from 0): int64 `[batch_size]` or fewer."""
        epoch, within = divmod(step, self.num_steps_per_epoch)
        start = within * self.batch_size
        stop = min(start + self.batch_size, self.groups)
        return np.array([self._order[epoch * self.groups + i] for i in range(start, stop)], np.int64)

    def sampled_steps(self) -> list[np.ndarray]:
        """Groups of up to eight steps spread over the first epoch, for `choose_capacity`; whole steps if any."""
        whole = max(1, self.groups // self.batch_size)
        count = min(SAMPLED_STEPS, whole, max(1, SAMPLED_GROUPS // self.batch_size))
        return [self.groups_of_step(int(step)) for step in np.linspace(0, whole - 1, count)]

    @functools.cached_property
    def _order(self) -> grain.MapDataset:
        """Endless, by random access: element `epoch * groups + i` is the i-th group of that epoch."""
        order = grain.MapDataset.range(self.groups).seed(self.seed)
        return (order.shuffle() if self.shuffle else order).repeat()


def microbatches(dataset: TokenizedDataset, indices: Sequence[int] | np.ndarray, layout: Layout) -> list[Batch]:
    """The fewest microbatches of one shape that hold the given groups.

    Args:
      dataset: all groups.
      indices: which of them, for example `StepPlan.groups_of_step(step)`.
      layout: the shape.
    Returns:
      NumPy batches; the last one may have empty rows.
    Raises:
      InputError: if a group alone exceeds the layout's capacity.
    """
    rows = _pack(dataset, np.asarray(indices), layout)
    return [_batch(dataset, rows[start : start + layout.rows], layout) for start in range(0, len(rows), layout.rows)]


def prefetched(
    dataset: TokenizedDataset, plan: StepPlan, layout: Layout, start: int, stop: int
) -> Iterator[tuple[int, list[Batch]]]:
    """The microbatches of steps `start` to `stop - 1`, in order, built by threads ahead of their use."""

    def build(step: int) -> tuple[int, list[Batch]]:
        return step, microbatches(dataset, plan.groups_of_step(step), layout)

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_STEPS)
    yield from grain.MapDataset.range(start, stop).map(build).to_iter_dataset(ahead)


def first_epoch(dataset: TokenizedDataset, plan: StepPlan, layout: Layout, steps: int) -> Iterator[Batch]:
    """The microbatches of the first `steps` steps, up to the end of the first epoch: each group once, as it is trained.

    For the reference pass: a group is packed there as in its first training step, so its log-probs are rounded alike,
    and a run that stops early does not pay for groups it never sees.
    """
    for step in range(min(steps, plan.num_steps_per_epoch)):
        yield from microbatches(dataset, plan.groups_of_step(step), layout)


def all_batches(dataset: TokenizedDataset, layout: Layout) -> Iterator[Batch]:
    """Every group once, in few batches of one shape: for evaluation."""
    parts = math.ceil(len(dataset) / PACKED_TOGETHER)
    order = np.argsort(
        dataset.tokens, kind="stable"
    )  # strided below: every part has its share of long and short groups
    rows: list[list[int]] = []
    for part in range(parts):
        rows += _pack(dataset, order[part::parts], layout)
        while len(rows) >= layout.rows:
            yield _batch(dataset, rows[: layout.rows], layout)
            rows = rows[layout.rows :]
    if rows:
        yield _batch(dataset, rows, layout)


def _pack(dataset: TokenizedDataset, indices: np.ndarray, layout: Layout) -> list[list[int]]:
    """Rows of indices in the dataset."""
    rows = pack(dataset.tokens[indices], dataset.slots[indices], layout.capacity)
    return [[int(indices[group]) for group in row] for row in rows]


def _batch(dataset: TokenizedDataset, rows: Sequence[Sequence[int]], layout: Layout) -> Batch:
    return build_batch(dataset.groups, range(len(dataset)), rows, layout)
