"""The loop: when it saves, evaluates and stops. The programs are stand-ins, so nothing is compiled."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdpo.data.pipeline import microbatches
from jaxdpo.losses import LOSSES, weighted_by_policy
from jaxdpo.reference import located
from jaxdpo.sharding import make_mesh, replicated
from jaxdpo.train.checkpoint import Checkpoints
from jaxdpo.train.evaluation import Evaluation
from jaxdpo.train.flops import Peak
from jaxdpo.train.loop import FIRST_LOSS_TOLERANCE, Objective, Schedule, check_first_loss, train
from jaxdpo.train.profile import Profile
from jaxdpo.train.state import init_state
from jaxdpo.train.step import Microbatch, StepPrograms
from jaxdpo.train.stopwatch import Compilations, Stopwatch
from jaxdpo.train.watch import Watch
from jaxdpo.train.writer import MetricsWriter, read_metrics
from jaxdpo.types import RunStopped
from tests import tiny

DATA = tiny.dataset(groups=6)
LAYOUT = tiny.layout(DATA)
LOSS = LOSSES["sigmoid"]
SCALARS = {"beta": 0.1, "label_smoothing": 0.0}
LN2 = math.log(2)


def objective(dtype="float32"):
    reference = located(np.zeros(DATA.slots.sum(), np.float32), np.arange(len(DATA)), DATA.slots, len(DATA))
    return Objective(LOSS, SCALARS, reference, dtype)


def first_microbatches():
    """Of a step whose policy has the reference's log-probs, all 0."""
    batches = microbatches(DATA, [0, 1], LAYOUT)
    return [Microbatch(batch, np.zeros(batch.slot_owner.shape, np.float32)) for batch in batches]


def programs(losses, norms=None, spoiled=()):
    """One-microbatch steps that report these losses and gradient norms, and `nan` for the groups in `spoiled`."""
    reported = iter(zip(losses, norms or [1.0] * len(losses), strict=True))

    def step(state, microbatch, counts, scalars):
        loss, norm = next(reported)
        metrics = {"rewards/margins": jnp.float32(0.25), "loss": jnp.float32(loss)}
        per_group = jnp.where(jnp.isin(microbatch.batch.example_id, jnp.array([-2, *spoiled])), jnp.nan, LN2)
        return state._replace(step=state.step + 1), metrics | {"grad_norm": jnp.float32(norm)}, per_group

    return StepPrograms(step, None, None, None, None)


class Result:
    """What a run of the loop left."""

    def __init__(
        self,
        tmp_path,
        made,
        *,
        total=6,
        save_every=2,
        eval_every=None,
        held_out=False,
        pairs=2,
        source=iter,
        advance=lambda **phase: None,
        profile=range(0),
    ):
        mesh = make_mesh(jax.devices()[:1])
        state = init_state({"a": jax.device_put(np.zeros(8, np.float32), replicated(mesh))}, optax.sgd(1.0), mesh)
        self.saved, self.evaluated = [], []
        self.writer = MetricsWriter(tmp_path / "metrics.jsonl", resume_step=0)
        self.checkpoints = Checkpoints(tmp_path / "checkpoints", {})
        save = self.checkpoints.save

        def save_and_tell(state, *metrics):
            self.saved.append(int(state.step))
            advance(checkpoint=16)
            save(state, *metrics)

        self.checkpoints.save = save_and_tell
        # Without a listener: what the stand-ins compile is nobody's.
        self.watch = Watch(
            Stopwatch(Compilations()),
            lambda batch: 1.0,
            Peak(1.0, "made up"),
            mesh,
            Profile(tmp_path / "profile", profile),
        )
        groups = [[(pairs * step + i) % len(DATA) for i in range(pairs)] for step in range(total)]

        def evaluate(state):
            self.evaluated.append(len(read_metrics(tmp_path / "metrics.jsonl")) + 1)
            advance(evaluation=8)
            return Evaluation({"eval_loss": 0.5}, 1, np.zeros(1))

        try:
            self.state, self.evaluation = train(
                state,
                made,
                source((step, microbatches(DATA, groups[step], LAYOUT)) for step in range(total)),
                objective(),
                Schedule(total, save_every, eval_every, lambda step: jnp.float32(1e-6 * (step + 1))),
                evaluate=evaluate if held_out else None,
                writer=self.writer,
                checkpoints=self.checkpoints,
                watch=self.watch,
            )
        finally:
            self.writer.close()
            self.checkpoints.close()
            self.rows = read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize("total, every, saved", [(6, 2, [2, 4, 6]), (5, 2, [2, 4, 5]), (3, 9, [3]), (3, 1, [1, 2, 3])])
def test_it_saves_at_intervals_and_at_the_end(tmp_path, total, every, saved):
    result = Result(tmp_path, programs([LN2] * total), total=total, save_every=every)
    assert result.saved == saved and result.checkpoints.latest_step == total
    assert result.evaluation is None and int(result.state.step) == total


@pytest.mark.parametrize("every, evaluated", [(None, [5]), (2, [2, 4, 5]), (5, [5])])
def test_it_evaluates_at_intervals_and_at_the_end(tmp_path, every, evaluated):
    result = Result(tmp_path, programs([LN2] * 5), total=5, eval_every=every, held_out=True)
    assert result.evaluated == evaluated
    assert [row["step"] for row in result.rows if "eval_loss" in row] == evaluated
    assert result.evaluation.metrics == {"eval_loss": 0.5}


def test_a_row_says_what_the_step_did(tmp_path):
    rows = Result(tmp_path, programs([LN2, 0.5], [3.0, 4.0]), total=2).rows
    for row in rows:
        assert set(tiny.MEASURED) - tiny.AT_TIMES <= set(row)
        assert row["pairs_per_second"] > 0 and row["seconds/data_wait"] > 0 and row["seconds/step"] > 0
    for number, (row, loss, norm) in enumerate(zip(tiny.timeless(rows), (LN2, 0.5), (3.0, 4.0), strict=True)):
        assert row == {
            "step": number + 1,
            "loss": pytest.approx(loss, rel=1e-6),
            "rewards/margins": 0.25,
            "grad_norm": norm,
            "learning_rate": pytest.approx(1e-6 * (number + 1)),
            "tokens": int(DATA.tokens[2 * number : 2 * number + 2].sum()),
        }


def test_the_time_of_each_phase_is_told_apart(tmp_path, monkeypatch):
    """A clock that the data moves by 3 seconds, a step by 1, an evaluation by 8 and a save by 16."""
    now = [0.0]
    monkeypatch.setattr("jaxdpo.train.stopwatch.time.perf_counter", lambda: now[0])

    def advance(**phase):
        now[0] += sum(phase.values())

    def steps(made):
        for item in made:
            advance(data_wait=3)
            yield item

    def step(*args):
        advance(step=1)
        return made.step(*args)

    made = programs([LN2] * 4)
    options = {"total": 4, "save_every": 2, "eval_every": 2, "held_out": True, "source": steps, "advance": advance}
    result = Result(tmp_path, made._replace(step=step), **options)
    for row in result.rows:
        even, behind_a_save = row["step"] % 2 == 0, row["step"] == 3
        assert {name.split("/")[1]: row[name] for name in row if name.startswith("seconds/")} == {
            "data_wait": 3,
            "step": 1,
            "evaluation": 8 * even,
            "checkpoint": 16 * behind_a_save,
            "logging": 0,
        }
        assert row["pairs_per_second"] == 2 / 4
    assert [row["goodput"] for row in result.rows] == [1 / 4, 2 / 16, 3 / 36, 4 / 48]
    usage = result.watch.usage()
    assert usage.timing[:4] == (4.0, 3, 12.0, 9.0)
    assert sum(usage.spent.values()) == now[0] == 4 * (3 + 1) + 2 * (8 + 16)
    assert usage.spent["checkpoint"] == 32  # the last one, which no row has, too


def test_a_trace_is_closed_where_a_run_stops(tmp_path):
    with pytest.raises(FloatingPointError):
        Result(tmp_path, programs([LN2, 0.5, math.nan]), total=3, profile=range(2, 4))
    (path,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert jax.profiler.ProfileData.from_file(str(path))
    with jax.profiler.trace(tmp_path / "other"):  # which only one can be
        pass


def stopped(tmp_path, made, **options):
    """The error, and the steps that have a row."""
    with pytest.raises(FloatingPointError) as error:
        Result(tmp_path, made, **options)
    return str(error.value), [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]


def test_a_loss_that_is_not_finite_names_its_examples(tmp_path):
    message, steps = stopped(tmp_path, programs([LN2, 0.5, math.nan], spoiled=[5]), total=3)
    assert message.startswith(
        "step 3: loss nan, gradient norm 1.0, not finite; examples (0-based, as kept) [5]; last good: "
    )
    assert f"last good: {tmp_path}/checkpoints/2; fix: look at these examples, or lower --learning-rate" in message
    assert steps == [1, 2]


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_all_examples_of_the_step(tmp_path, norm):
    """No single one is to blame where every loss is finite."""
    message, steps = stopped(tmp_path, programs([LN2, 0.5], [1.0, norm]), total=2)
    assert message.startswith(
        f"step 2: loss 0.5, gradient norm {norm}, not finite; examples (0-based, as kept) [2, 3]; "
    )
    assert "; no checkpoint was saved yet; fix: " in message
    assert steps == [1]


def test_a_first_step_that_is_not_finite_is_named_too(tmp_path):
    message, steps = stopped(tmp_path, programs([math.nan], spoiled=[0]), total=1)
    assert message.startswith("step 1: loss nan, ") and "[0]; no checkpoint was saved yet" in message
    assert steps == []


def test_the_first_loss_must_be_that_of_the_reference(tmp_path):
    with pytest.raises(
        RunStopped, match=r"the loss of the first step is 0\.700000; a policy equal to its reference has 0\.69"
    ):
        Result(tmp_path, programs([0.7]), total=1)


def test_later_losses_may_be_anything_finite(tmp_path):
    assert [row["loss"] for row in Result(tmp_path, programs([LN2, 30.0, 0.0]), total=3).rows[1:]] == [30.0, 0.0]


@pytest.mark.parametrize("dtype, tolerance", FIRST_LOSS_TOLERANCE.items())
def test_tolerance_of_the_first_loss(dtype, tolerance):
    for sign in (-1, 1):
        check_first_loss({"loss": LN2 + sign * 0.9 * tolerance}, first_microbatches(), objective(dtype))
        with pytest.raises(
            RunStopped, match=rf"within {tolerance:g} in {dtype}: policy and reference are not computed alike"
        ):
            check_first_loss({"loss": LN2 + sign * 1.1 * tolerance}, first_microbatches(), objective(dtype))


def test_the_contract_of_the_first_loss():
    assert FIRST_LOSS_TOLERANCE == {"float32": 1e-4, "bfloat16": 2e-2}


def test_label_smoothing_does_not_change_the_first_loss():
    """-(1 - s) log sigmoid(0) - s log sigmoid(0) is ln 2 for any s."""
    smoothed = objective()._replace(scalars={"beta": 0.1, "label_smoothing": 0.3})
    check_first_loss({"loss": LN2}, first_microbatches(), smoothed)


@pytest.mark.parametrize(
    "name, expected", [("ipo", 25.0), ("sppo_hard", 50.0), ("plackett_luce", LN2), ("aot", LN2), ("apo_zero", 1.0)]
)
def test_the_first_loss_of_other_objectives(name, expected):
    """At beta 0.1: 1 / (2 beta) squared, twice that, and at a sigmoid of 0; relative to it where it is large."""
    made = Objective(LOSSES[name], {"beta": 0.1}, None, "float32")
    check_first_loss({"loss": expected * (1 + 0.9e-4)}, first_microbatches(), made)
    with pytest.raises(RunStopped, match="a policy equal to its reference has"):
        check_first_loss({"loss": expected * 1.001}, first_microbatches(), made)


def test_without_a_reference_the_first_loss_is_not_known():
    check_first_loss({"loss": 123.0}, first_microbatches(), Objective(LOSSES["simpo"], {"beta": 2.0}, None, "float32"))


def test_a_weighted_loss_is_known_by_its_divergence():
    made = Objective(weighted_by_policy(LOSS), {"beta": 0.1}, None, "float32")
    check_first_loss({"loss": 0.1, "kl": -0.9e-3, "logps/chosen_drift": 0.0}, first_microbatches(), made)
    with pytest.raises(RunStopped, match=r"the kl of the first step is 0\.00"):
        check_first_loss({"loss": 0.1, "kl": 0.0, "logps/chosen_drift": 1.1e-3}, first_microbatches(), made)
