"""What a policy does on held-out pairs: TRL's names, ties count one half, and how sure the mean margin is."""

import math

import jax
import numpy as np
import optax
import pytest

from jaxdpo.losses import LOSSES, weighted_by_policy
from jaxdpo.sharding import make_mesh, replicated
from jaxdpo.train.evaluation import Evaluation, evaluate, held_out_evaluation
from jaxdpo.train.objective import GroupData, Outputs, preference_task
from jaxdpo.train.state import init_state
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


DATA = tiny.dataset(groups=5)


@pytest.fixture
def model():
    """A task that measures ever other numbers, a state, and the parameters that were measured."""
    measured = []

    def measure(params, batch, scalars):
        jax.debug.callback(lambda scale: measured.append(float(scale)), params["scale"])
        logps = -params["scale"] * batch.candidate_last.astype(np.float32)
        return Outputs(logps, {"log_sum_sq_probs": logps / 2})

    def make(loss):
        task = preference_task(tiny.decoder(), loss)._replace(measure=measure)
        mesh = make_mesh(jax.devices()[:1])
        params = {"scale": jax.device_put(np.float32(1), replicated(mesh))}
        return task, init_state(params, optax.sgd(1.0), mesh)

    return make, measured


def later(state, scale, ref_scale=None):
    """The state with another policy, and perhaps a reference that has moved."""
    change = jax.tree.map(lambda x: x * 0 + scale, state.params)
    return state._replace(
        params=change, ref_params=None if ref_scale is None else jax.tree.map(lambda x: x * 0 + ref_scale, state.params)
    )


@pytest.mark.parametrize("stored", [False, True], ids=["measured", "stored"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_stored_reference_spares_its_pass(model, stored, weighted):
    """A loss that weighs by the policy needs more of it than its log-probs, which are the reference's nevertheless."""
    make, measured = model
    task, state = make(weighted_by_policy(LOSSES["sigmoid"]) if weighted else LOSSES["sigmoid"])
    layout = tiny.layout(DATA, tokens=1024)
    reference = -np.arange(10.0).reshape(5, 2) if stored else None
    before, of = held_out_evaluation(task, SCALARS, DATA, layout, state, reference=reference)
    jax.effects_barrier()
    assert measured == ([1.0] if weighted or not stored else [])
    assert before.metrics["eval_rewards/accuracies"] == 0.5 and (before.margins == 0).all()
    after = of(later(state, 2.0))
    jax.effects_barrier()
    assert measured[-1] == 2.0 and len(measured) == (2 if weighted or not stored else 1)
    policy = after.metrics["eval_logps/chosen"] - after.metrics["eval_logps/rejected"]
    known = reference if stored else None
    gap = (known[:, 0] - known[:, 1]).mean() if stored else policy / 2
    assert after.metrics["eval_rewards/margins"] == pytest.approx(0.5 * (policy - gap), rel=1e-5)


def test_a_reference_that_moves_is_measured_where_it_is(model):
    make, measured = model
    task, state = make(LOSSES["sigmoid"])
    before, of = held_out_evaluation(task, SCALARS, DATA, tiny.layout(DATA, tokens=1024), later(state, 1.0, 1.0))
    assert (before.margins == 0).all()
    assert (of(later(state, 2.0, 2.0)).margins == 0).all()
    jax.effects_barrier()
    assert measured == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("margins, error", [([1.0, 2.0, 6.0], math.sqrt(7 / 3)), ([3.0, 3.0], 0.0), ([5.0], 0.0)])
def test_standard_error_of_the_mean_margin(margins, error):
    """The sample variance of (1, 2, 6) is (4 + 1 + 9) / 2 = 7."""
    assert Evaluation({}, len(margins), np.array(margins)).margin_standard_error == pytest.approx(error)
