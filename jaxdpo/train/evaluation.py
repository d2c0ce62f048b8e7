"""A policy on held-out groups, before, during and after training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import all_batches
from jaxdpo.data.tokenize import TokenizedDataset
from jaxdpo.losses import LossSpec
from jaxdpo.losses.metrics import mean_metrics
from jaxdpo.reference import DatasetLogps, LogpProgram, dataset_logps
from jaxdpo.train.objective import GroupData, Scalars, Sums, group_losses, group_metrics
from jaxdpo.train.state import TrainState
from jaxdpo.train.step import as_floats
from jaxdpo.types import UNRANKED


class Evaluation(NamedTuple):
    """What a policy does on a dataset."""

    metrics: dict[str, float]
    """TRL's names prefixed `eval_`, means over the evaluated groups."""
    margins: np.ndarray | None
    """`[examples]` reward margin of every group, nats times beta; None where completions are not compared."""

    @property
    def margin_standard_error(self) -> float:
        """Standard error of the mean margin; 0 for fewer than two groups."""
        if self.margins is None or len(self.margins) < 2:
            return 0.0
        return float(self.margins.std(ddof=1) / np.sqrt(len(self.margins)))


def evaluate(
    loss: LossSpec, policy: DatasetLogps, data: GroupData, scalars: Scalars, *, baseline: Any = None
) -> Evaluation:
    """Loss and preference metrics of a policy over a whole dataset, all groups at once.

    Args:
      loss: what is trained.
      policy: its log-probs on the dataset.
      data: the dataset's groups, and the reference's log-probs on them.
      scalars: options of the loss by name.
      baseline: the running mean of a loss that carries one.
    """
    sums = Sums(policy.sequences, policy.statistics)
    losses = group_losses(loss, sums, data, scalars, None if baseline is None else {"baseline": baseline})
    values = {"loss": losses, **group_metrics(sums, data, scalars)}
    means = mean_metrics({name: value.sum() for name, value in values.items()}, len(policy.sequences))
    margins = values.get("rewards/margins")
    return Evaluation(
        {f"eval_{name}": value for name, value in as_floats(means).items()},
        None if margins is None else np.asarray(margins),
    )


def held_out_evaluation(
    loss: LossSpec,
    scalars: Scalars,
    program: LogpProgram,
    dataset: TokenizedDataset,
    layout: Layout,
    state: TrainState,
) -> tuple[Evaluation, Callable[[TrainState], Evaluation]]:
    """Evaluates an untrained policy on held-out groups, and returns how to evaluate a state after it.

    Args:
      loss: what is trained.
      scalars: its options.
      program: from `make_logp_program`, with the statistics that the loss asks for.
      dataset: the held-out groups.
      layout: shape of their batches.
      state: before the first step: its policy is the reference.
    Returns:
      That state's evaluation, and a function from a state to its evaluation. A reference that moves is taken as it is
      at that state.
    """
    mesh = state.mesh

    def logps(params: dict) -> DatasetLogps:
        batches = all_batches(dataset, layout)
        return dataset_logps(program, params, batches, mesh, label="held out", total=len(dataset))

    def of(policy: DatasetLogps, state: TrainState) -> Evaluation:
        reference = None
        if loss.needs_reference:
            reference = (initial if state.ref_params is None else logps(state.ref_params)).sequences
        baseline = None if state.running is None else state.running.mean
        return evaluate(loss, policy, group_data(dataset, policy.mask, reference), scalars, baseline=baseline)

    initial = logps(state.params)
    # The same program on the same parameters gives the same numbers, so the reference is its own policy here.
    return of(initial, state), lambda state: of(logps(state.params), state)


def group_data(dataset: TokenizedDataset, mask: np.ndarray, ref_logps: np.ndarray | None) -> GroupData:
    """What a loss reads of a whole dataset: `[examples, candidates]` each."""
    shape = mask.shape
    lengths, ranks = np.zeros(shape, np.float32), np.full(shape, UNRANKED)
    label = np.zeros(shape, np.float32) if dataset.labelled else None
    for example, group in enumerate(dataset.groups):
        count = len(group.completions)
        lengths[example, :count] = [len(completion) for completion in group.completions]
        ranks[example, :count] = group.candidate_ranks
        if label is not None:
            label[example, 0] = group.label
    return GroupData(ref_logps, mask, lengths, ranks, label)
