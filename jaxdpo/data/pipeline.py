"""The microbatches of the steps of a run, and those of a whole dataset."""

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import Layout, build_batch, pack
from jaxdpo.data.plan import StepPlan
from jaxdpo.types import Batch

PREFETCHED_STEPS = 4
PACKED_TOGETHER = 1024
"""Groups that `all_batches` packs at a time: enough to fill rows well; the time of packing grows with its square."""


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
    return [
        build_batch(dataset, rows[start : start + layout.rows], layout) for start in range(0, len(rows), layout.rows)
    ]


def prefetched(
    dataset: TokenizedDataset, plan: StepPlan, layout: Layout, start: int, stop: int
) -> Iterator[tuple[int, list[Batch]]]:
    """The microbatches of steps `start` to `stop - 1`, in order, built by threads ahead of their use."""

    def build(step: int) -> tuple[int, list[Batch]]:
        return step, microbatches(dataset, plan.groups_of_step(step), layout)

    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCHED_STEPS)
    yield from grain.MapDataset.range(start, stop).map(build).to_iter_dataset(ahead)


def first_epoch(dataset: TokenizedDataset, plan: StepPlan, layout: Layout, steps: int) -> Iterator[Batch]:
    """The microbatches of the first `steps` steps, without the groups that an earlier step holds: each group once.

    For the reference pass: a group is packed there as in its first training step, so its log-probs are rounded alike,
    and a run that stops early does not pay for groups it never sees. Where every weight is 1 it ends with the first
    epoch.
    """
    seen = np.zeros(len(dataset), bool)
    for step in range(steps):
        indices = np.array(list(dict.fromkeys(plan.groups_of_step(step).tolist())))
        indices = indices[~seen[indices]]
        if len(indices):
            seen[indices] = True
            yield from microbatches(dataset, indices, layout)
        if seen.all():
            return


def all_batches(dataset: TokenizedDataset, layout: Layout) -> Iterator[Batch]:
    """Every group once, in few batches of one shape: for evaluation."""
    parts = math.ceil(len(dataset) / PACKED_TOGETHER)
    order = np.argsort(dataset.tokens, kind="stable")  # strided: every part has its share of long and short groups
    rows: list[list[int]] = []
    for part in range(parts):
        rows += _pack(dataset, order[part::parts], layout)
        while len(rows) >= layout.rows:
            yield build_batch(dataset, rows[: layout.rows], layout)
            rows = rows[layout.rows :]
    if rows:
        yield build_batch(dataset, rows, layout)


def _pack(dataset: TokenizedDataset, indices: np.ndarray, layout: Layout) -> list[list[int]]:
    """Rows of indices in the dataset."""
    rows = pack(dataset.tokens[indices], dataset.slots[indices], layout.capacity)
    return [[int(indices[group]) for group in row] for row in rows]
