"""The training loop: batch, step, check, log, evaluate, save."""

import contextlib
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tqdm

from jaxdpo import processes
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.losses import LossSpec
from jaxdpo.reference import FrozenReference, LogpProgram, TokenLogps, slot_logps
from jaxdpo.sharding import place_batch
from jaxdpo.train.checkpoint import Checkpoints
from jaxdpo.train.evaluation import Evaluation
from jaxdpo.train.interrupt import Interruption
from jaxdpo.train.loggers import Loggers
from jaxdpo.train.objective import GroupData, Outputs, group_data, group_losses, joined_groups, step_counts
from jaxdpo.train.state import TrainState, move_reference
from jaxdpo.train.step import Microbatch, StepPrograms, run_step, shortest
from jaxdpo.train.watch import Watch
from jaxdpo.types import Batch, RunInterrupted, RunStopped

FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the first loss may be from that of a policy equal to its reference (ln 2 for DPO), by compute dtype; in
relation to it where it is above 1."""


SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "accuracy", "margin", "mean_token_accuracy")
"""Metrics that the progress bar shows, those of them that a run has."""


class Schedule(NamedTuple):
    """When the loop does what, in optimizer steps."""

    total: int
    save_every: int
    eval_every: int | None
    learning_rate: Callable[[int], Any]
    save_evaluated: bool = False
    """Whether every state that is evaluated is saved: one of them may be the best."""


class MovingReference(NamedTuple):
    """A reference that follows the policy, and so is evaluated at every step."""

    program: LogpProgram
    sync_steps: int
    """Optimizer steps after which it moves."""
    mixup: float
    """How far, from 0 to 1."""


class Objective(NamedTuple):
    """What is minimised, and against which reference."""

    loss: LossSpec
    scalars: Mapping[str, Any]
    reference: TokenLogps | FrozenReference | MovingReference | None
    """Stored log-probs, a reference that stays or moves, or none."""
    dtype: str
    groups: Sequence[TokenizedGroup] = ()
    """Of each example, for messages that name where it came from; empty where that is not known."""

    def ref_logps(self, state: TrainState, batch: Batch) -> Any:
        """`[rows, slots]` log-probs of the reference on a batch; None without one."""
        if isinstance(self.reference, MovingReference):
            assert state.ref_params is not None  # `init_state(moving_reference=True)`
            return self.reference.program(state.ref_params, place_batch(batch, state.mesh))[0]
        return None if self.reference is None else slot_logps(self.reference, batch)


def train(
    state: TrainState,
    programs: StepPrograms,
    steps: Iterable[tuple[int, list[Batch]]],
    objective: Objective,
    schedule: Schedule,
    *,
    evaluate: Callable[[TrainState], Evaluation] | None,
    writer: Loggers,
    checkpoints: Checkpoints,
    watch: Watch,
) -> tuple[TrainState, Evaluation | None]:
    """Runs optimizer steps until `schedule.total`; the last one is always evaluated and saved.

    Args:
      state: after `state.step` updates; donated.
      programs: the compiled step.
      steps: 0-based step and its host microbatches, from `state.step` on.
      objective: the loss, its options and the reference's log-probs.
      schedule: when to save and evaluate.
      evaluate: what a state does on held-out data, or None without it.
      writer: gets one row per step.
      checkpoints: where states go.
      watch: measures the steps; its first row begins here.
    Returns:
      The last state, and its evaluation: None without held-out data, or if nothing was left to do.
    Raises:
      FloatingPointError: for a loss or gradient that is not finite; names step, examples and last good checkpoint.
      RunInterrupted: after Ctrl-C or SIGTERM; the step that was under way is done and saved.
      RunStopped: if the first loss is not that of a policy equal to its reference, or a disk is full.
    """
    mesh = state.mesh
    evaluation, quiet = None, not processes.is_main()
    progress = tqdm.tqdm(total=schedule.total, initial=int(state.step), desc="train", unit="step", disable=quiet)
    with progress as bar, Interruption() as stop, contextlib.closing(watch):
        for step, batches in steps:
            with watch.step(step + 1, batches):
                placed = place_batch(batches, mesh)
                watch.ready()
                counts = step_counts(batches)
                microbatches = [
                    Microbatch(here, place_batch(objective.ref_logps(state, batch), mesh))
                    for batch, here in zip(batches, placed, strict=True)
                ]
                state, metrics, losses = run_step(programs, state, microbatches, counts, objective.scalars)
                stop.hold()
            if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
                raise FloatingPointError(_not_finite(step + 1, metrics, batches, losses, objective.groups, checkpoints))
            if step == 0:
                check_first_loss(metrics, microbatches, objective)
            moving = objective.reference if isinstance(objective.reference, MovingReference) else None
            if moving is not None and (step + 1) % moving.sync_steps == 0:
                state = move_reference(state, moving.mixup)
            learning_rate = shortest(schedule.learning_rate(step))
            watch.lap("step")
            last, evaluated = step + 1 == schedule.total, None
            if evaluate and (last or (schedule.eval_every and (step + 1) % schedule.eval_every == 0)):
                evaluation = evaluated = evaluate(state)
                watch.lap("evaluation")
            measured = watch.row(step + 1, int(counts.groups))
            row = {"step": step + 1, **metrics, "learning_rate": learning_rate, **measured}
            with processes.together():
                writer.write(row | (evaluated.metrics if evaluated else {}))
            shown = [f"{name} {row[name]:.4f}" for name in SHOWN if name in row]
            bar.set_postfix_str(", ".join([*shown, f"{row['pairs_per_second']:.2f} pairs/s"]), refresh=False)
            bar.update()
            watch.lap("logging")
            stopping = _signal_of_any(stop)  # read once: one that comes during the save waits for the next step
            due = last or stopping or (step + 1) % schedule.save_every == 0
            if due or (evaluated and schedule.save_evaluated):
                checkpoints.save(state, evaluated.metrics if evaluated else None)
                watch.lap("checkpoint")
            if stopping:
                break
        checkpoints.wait()
        watch.lap("checkpoint")
        if (number := _signal_of_any(stop)) is not None:
            raise RunInterrupted(_interrupted(number.name, checkpoints, schedule.total), number)
    return state, evaluation


def _signal_of_any(stop: Interruption) -> signal.Signals | None:
    """The signal that came to one of the processes: all of them stop after the same step."""
    number = processes.largest(stop.signal or 0)
    return signal.Signals(number) if number else None


def check_first_loss(metrics: Mapping[str, float], microbatches: Sequence[Microbatch], objective: Objective) -> None:
    """RunStopped unless the first loss is that of a policy equal to its reference: ln 2 for DPO.

    A loss that weighs its groups by the policy (WPO) has no value known beforehand; there the estimated KL divergence
    and the drift of the chosen have to be 0.
    """
    if not objective.loss.needs_reference:
        return
    tolerance = FIRST_LOSS_TOLERANCE.get(objective.dtype, 1e-4)
    if "log_sum_sq_probs" in objective.loss.data:
        name, expected = "kl", 0.0
        got = max(metrics["kl"], metrics["logps/chosen_drift"], key=abs)
        tolerance /= objective.scalars["beta"]
    else:
        name, got, expected = "loss", metrics["loss"], _loss_at_reference(microbatches, objective)
        tolerance *= max(1.0, abs(expected))
    if abs(got - expected) > tolerance:
        raise RunStopped(
            f"the {name} of the first step is {got:.6f}; a policy equal to its reference has {expected:.6f} within "
            f"{tolerance:g} in {objective.dtype}: policy and reference are not computed alike; with --dtype bfloat16 "
            "try --dtype float32, otherwise please report it with the model's name"
        )


def _loss_at_reference(microbatches: Sequence[Microbatch], objective: Objective) -> float:
    """The loss of a step whose policy has the reference's log-probs."""
    parts = processes.fetch([group_data(*microbatch, objective.scalars) for microbatch in microbatches])
    data: GroupData = joined_groups(parts, [part.where.any(axis=-1) for part in parts])
    shared = {} if objective.loss.running is None else {"baseline": 0.0}  # all rewards are 0
    losses = group_losses(objective.loss, Outputs(data.ref_logps, {}), data, objective.scalars, shared)
    return float(losses.mean())


def _interrupted(signal: str, checkpoints: Checkpoints, total: int) -> str:
    step = checkpoints.latest_step
    done = f"all {total} steps, before the export" if step == total else f"step {step} of {total}"
    return f"{signal} after {done}, saved in {checkpoints.directory}; give the same command again to go on from there"


def _not_finite(
    step: int,
    metrics: Mapping[str, float],
    batches: list[Batch],
    losses: list[Any],
    groups: Sequence[TokenizedGroup],
    checkpoints: Checkpoints,
) -> str:
    ids = np.concatenate([batch.example_id[batch.group_mask] for batch in batches])
    values = np.concatenate([np.asarray(loss)[batch.group_mask] for batch, loss in zip(batches, losses, strict=True)])
    culprits = sorted((ids[~np.isfinite(values)] if not np.isfinite(values).all() else ids).tolist())
    named = f": {'; '.join(str(groups[i].origin) for i in culprits)}" if len(groups) else ""
    checkpoints.wait()
    saved = checkpoints.latest_step
    where = "no checkpoint was saved yet" if saved is None else f"last good: {checkpoints.directory / str(saved)}"
    return (
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, not finite; "
        f"examples (0-based, as kept) {culprits}{named}; {where}; "
        "fix: look at these examples, or lower --learning-rate in another --output-dir"
    )
