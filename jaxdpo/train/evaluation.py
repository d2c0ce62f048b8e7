"""Implicit rewards on held-out pairs, before, during and after training."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxdpo.losses import LossSpec
from jaxdpo.reference import DatasetLogps
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
