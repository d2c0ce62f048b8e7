"""The microbatches of the steps of a run, and those of a whole dataset."""

import math
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from jaxdpo.data.batch import build_batch
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import Layout
from jaxdpo.data.plan import StepPlan
from jaxdpo.types import Batch

PREFETCHED_STEPS = 4
PACKED_TOGETHER = 1024
"""Groups that `all_batches` packs at a time, about: enough to fill rows well; the time of packing grows with its
square."""


def microbatches(dataset: TokenizedDataset, indices: Sequence[int] | np.ndarray, layout: Layout) -> list[Batch]:
    """The microbatches that hold the given groups with the least work.

    Args:
      dataset: all groups.
      indices: which of them, for example `StepPlan.groups_of_step(step)`.
      layout: the shapes.
    Returns:
      NumPy batches; the last one of each shape may have empty rows.
    Raises:
      InputError: if a group alone exceeds the layout's capacity.
    """
    indices = np.asarray(indices)
    divided = layout.divide(dataset.tokens[indices], dataset.slots[indices])
    return [build_batch(dataset, [indices[row].tolist() for row in rows], shape) for shape, rows in divided]


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
    """Every group once, in few batches: for evaluation."""
    parts = math.ceil(len(dataset) / PACKED_TOGETHER)
    order = np.argsort(dataset.tokens, kind="stable")  # strided: every part has its share of long and short groups
    left = order[:0]
    for part in range(parts):
        indices = np.concatenate([left, order[part::parts]])
        divided = layout.divide(dataset.tokens[indices], dataset.slots[indices])
        made = [(shape, [indices[row].tolist() for row in rows]) for shape, rows in divided]
        if part + 1 < parts:  # the next part fills the last one up
            left = np.concatenate(made.pop()[1])
        for shape, rows in made:
            yield build_batch(dataset, rows, shape)
