"""A model on held-out groups, before, during and after training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import all_batches
from jaxdpo.forward import forward_batches
from jaxdpo.train.objective import (
    Counts,
    GroupData,
    Metrics,
    Outputs,
    Scalars,
    Task,
    group_losses,
    mean_totals,
    statistics_of,
    totals,
)
from jaxdpo.train.state import TrainState
from jaxdpo.train.step import as_floats


class Evaluation(NamedTuple):
    """What a model does on a dataset."""

    metrics: dict[str, float]
    """TRL's names prefixed `eval_`, means over the evaluated groups."""
    examples: int
    """How many groups."""
    margins: np.ndarray | None = None
    """`[examples]` reward margin of every group, nats times beta; None where completions are not compared."""

    @property
    def margin_standard_error(self) -> float:
        """Standard error of the mean margin; 0 for fewer than two groups."""
        if self.margins is None or len(self.margins) < 2:
            return 0.0
        return float(self.margins.std(ddof=1) / np.sqrt(len(self.margins)))


def evaluate(task: Task, outputs: Outputs, data: GroupData, scalars: Scalars, *, baseline: Any = None) -> Evaluation:
    """Loss and metrics of a model over a whole dataset, all groups at once.

    Args:
      task: what is trained.
      outputs: of the model on the dataset, `[examples, candidates]` each.
      data: the dataset's groups, and the reference's log-probs on them.
      scalars: options of the loss by name.
      baseline: the running mean of a loss that carries one.
    """
    exists = data.where[:, 0]
    counts = Counts(np.float32(exists.sum()), np.float32(data.lengths[exists, 0].mean()))
    losses = group_losses(task.loss, outputs, data, scalars, None if baseline is None else {"baseline": baseline})
    values: Metrics = {"loss": losses, **task.metrics(outputs, data, counts, scalars)}
    means = mean_totals(totals(values, data.where), counts.groups)
    margins = values.get("rewards/margins", values.get("margin"))
    return Evaluation(
        {f"eval_{name}": value for name, value in as_floats(means).items()},
        len(exists),
        None if margins is None else np.asarray(margins),
    )


def held_out_evaluation(
    task: Task,
    scalars: Scalars,
    dataset: TokenizedDataset,
    layout: Layout,
    state: TrainState,
    *,
    reference: np.ndarray | None = None,
) -> tuple[Evaluation, Callable[[TrainState], Evaluation]]:
    """Evaluates an untrained model on held-out groups, and returns how to evaluate a state after it.

    Args:
      task: what is trained.
      scalars: options of its loss.
      dataset: the held-out groups.
      layout: shape of their batches.
      state: before the first step: its policy is the reference.
      reference: `[examples, candidates]` log-probs of the reference where they are known already, nats.
    Returns:
      That state's evaluation, and a function from a state to its evaluation. A reference that moves is taken as it is
      at that state.
    """
    program = jax.jit(task.measure)

    def outputs(params: dict) -> Outputs:
        return _outputs(lambda params, batch: program(params, batch, scalars), params, dataset, layout, state.mesh)

    def of(measured: Outputs, reference: Any, state: TrainState) -> Evaluation:
        baseline = None if state.running is None else state.running.mean
        data = group_data(dataset, reference if task.loss.needs_reference else None)
        return evaluate(task, measured, data, scalars, baseline=baseline)

    def later(state: TrainState) -> Evaluation:
        moved = initial if state.ref_params is None else outputs(state.ref_params)
        return of(outputs(state.params), moved.values, state)

    # The reference is its own policy here: exactly, although what is stored was packed in other rows.
    if reference is None:
        initial = outputs(state.params)
    elif statistics_of(task.loss):
        initial = outputs(state.params)._replace(values=reference)
    else:
        initial = Outputs(reference, {})
    return of(initial, initial.values, state), later


def _outputs(
    program: Callable[[dict, Any], Outputs],
    params: dict,
    dataset: TokenizedDataset,
    layout: Layout,
    mesh: jax.sharding.Mesh,
) -> Outputs:
    """Of every group of a dataset, `[examples, candidates]` each."""
    shape = (len(dataset), dataset.candidates)
    gathered: dict[str, np.ndarray] = {}
    batches = all_batches(dataset, layout)
    passes = forward_batches(program, params, batches, mesh, label="held out", total=len(dataset))
    for batch, (values, statistics) in passes:
        for name, of_batch in {"": values, **statistics}.items():
            out = gathered.setdefault(name, np.zeros(shape))
            out[batch.example_id[batch.group_mask]] = of_batch[batch.group_mask][:, : shape[1]]
    return Outputs(gathered.pop(""), gathered)


def group_data(dataset: TokenizedDataset, ref_logps: np.ndarray | None) -> GroupData:
    """What a loss reads of a whole dataset: `[examples, candidates]` each."""
    lengths = dataset.completion_lengths().astype(np.float32)
    return GroupData(ref_logps, lengths > 0, lengths, dataset.ranks(), dataset.labels(), dataset.margins())
