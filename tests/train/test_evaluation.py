"""What a policy does on held-out pairs: TRL's names, ties count one half, and how sure the mean margin is."""

import math

import numpy as np
import pytest

from jaxdpo.losses import LOSSES
from jaxdpo.train.evaluation import Evaluation, evaluate
from jaxdpo.train.objective import GroupData, Outputs, preference_task
from tests import tiny

SCALARS = {"beta": 0.5, "label_smoothing": 0.0}


def logps(pairs):
    return Outputs(np.array(pairs, np.float64), {})


def data(reference):
    """What is known of pairs besides the policy's log-probs."""
    shape = reference.values.shape
    ranks = np.broadcast_to([0, 1], shape)
    return GroupData(reference.values, np.ones(shape, bool), 3 * np.ones(shape), ranks, None)


def test_means_over_the_pairs():
    reference = logps([[-10.0, -10.0], [-20.0, -20.0], [-30.0, -30.0]])
    policy = logps([[-8.0, -12.0], [-21.0, -21.0], [-33.0, -31.0]])  # margins 2, 0 and -1 in nats times beta
    result = evaluate(preference_task(tiny.decoder(), LOSSES["sigmoid"]), policy, data(reference), SCALARS)
    losses = [math.log1p(math.exp(-margin)) for margin in (2.0, 0.0, -1.0)]
    want = {
        "loss": np.mean(losses),
        "rewards/chosen": np.mean([1.0, -0.5, -1.5]),
        "rewards/rejected": np.mean([-1.0, -0.5, -0.5]),
        "rewards/accuracies": np.mean([1, 0.5, 0]),
        "rewards/margins": np.mean([2.0, 0.0, -1.0]),
        "logps/chosen": np.mean([-8.0, -21.0, -33.0]),
        "logps/rejected": np.mean([-12.0, -21.0, -31.0]),
    }
    assert next(iter(result.metrics)) == "eval_loss"
    got = {name: result.metrics[f"eval_{name}"] for name in want}
    assert got == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(result.margins, [2.0, 0.0, -1.0], rtol=1e-6)


@pytest.mark.parametrize("margins, error", [([1.0, 2.0, 6.0], math.sqrt(7 / 3)), ([3.0, 3.0], 0.0), ([5.0], 0.0)])
def test_standard_error_of_the_mean_margin(margins, error):
    """The sample variance of (1, 2, 6) is (4 + 1 + 9) / 2 = 7."""
    assert Evaluation({}, len(margins), np.array(margins)).margin_standard_error == pytest.approx(error)
