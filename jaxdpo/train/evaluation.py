"""Implicit rewards on held-out pairs, before, during and after training."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import all_batches
from jaxdpo.data.tokenize import TokenizedDataset
from jaxdpo.losses import LossSpec
from jaxdpo.reference import DatasetLogps, LogpProgram, dataset_logps
from jaxdpo.train.step import METRICS, group_metrics, shortest


class Evaluation(NamedTuple):
    """What a policy does on a dataset."""

    metrics: dict[str, float]
    """TRL's names prefixed `eval_`, means over the evaluated pairs."""
    margins: np.ndarray
    """`[examples]` reward margin of every pair, nats times beta."""

    @property
    def margin_standard_error(self) -> float:
        """Standard error of the mean margin; 0 for fewer than two pairs."""
        return float(self.margins.std(ddof=1) / np.sqrt(len(self.margins))) if len(self.margins) > 1 else 0.0


def evaluate(loss: LossSpec, policy: DatasetLogps, reference: DatasetLogps, scalars: Mapping[str, Any]) -> Evaluation:
    """Loss and preference metrics of a policy over a whole dataset; ties count one half in the accuracy."""
    values = group_metrics(loss, policy.sequences, reference.sequences, policy.mask, scalars)
    means = {f"eval_{name}": shortest(np.mean(values[name])) for name in METRICS}
    return Evaluation(means, np.asarray(values["rewards/margins"]))


def held_out_evaluation(
    loss: LossSpec,
    scalars: Mapping[str, float],
    program: LogpProgram,
    params: dict,
    dataset: TokenizedDataset,
    layout: Layout,
    mesh: jax.sharding.Mesh,
) -> tuple[Evaluation, Callable[[dict], Evaluation]]:
    """Evaluates the reference on held-out pairs, and returns how to evaluate a policy against it.

    Args:
      loss: a row of `LOSSES`.
      scalars: its options.
      program: from `make_logp_program`.
      params: of the reference.
      dataset: the held-out pairs.
      layout: shape of their batches.
      mesh: where to run.
    Returns:
      The reference's evaluation, and a function from a policy's parameters to its evaluation.
    """

    def logps(params: dict) -> DatasetLogps:
        batches = all_batches(dataset, layout)
        return dataset_logps(program, params, batches, mesh, label="held out", total=len(dataset))

    reference = logps(params)
    # The same program on the same parameters gives the same numbers, so the reference is its own policy here.
    before = evaluate(loss, reference, reference, scalars)
    return before, lambda params: evaluate(loss, logps(params), reference, scalars)
