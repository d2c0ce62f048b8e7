"""The training loop: batch, step, check, log, evaluate, save."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from jaxdpo.losses import LossSpec
from jaxdpo.reference import DatasetLogps, slot_logps
from jaxdpo.sharding import place_batch
from jaxdpo.train.checkpoint import Checkpoints
from jaxdpo.train.evaluation import Evaluation
from jaxdpo.train.state import TrainState
from jaxdpo.train.step import METRICS, Microbatch, StepPrograms, run_step, shortest
from jaxdpo.train.writer import MetricsWriter
from jaxdpo.types import Batch, RunStopped

FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""How far the first loss may be from that of a policy equal to its reference (ln 2 for DPO), by compute dtype."""


class Schedule(NamedTuple):
    """When the loop does what, in optimizer steps."""

    total: int
    save_every: int
    eval_every: int | None
    learning_rate: Callable[[int], Any]


class Objective(NamedTuple):
    """What is minimised, and against which reference."""

    loss: LossSpec
    scalars: Mapping[str, float]
    reference: DatasetLogps
    dtype: str
    lines: Sequence[int] = ()
    """Line in its file of each example, for messages; empty where there is no file."""


def train(
    state: TrainState,
    programs: StepPrograms,
    steps: Iterable[tuple[int, list[Batch]]],
    objective: Objective,
    schedule: Schedule,
    *,
    evaluate: Callable[[dict], Evaluation] | None,
    writer: MetricsWriter,
    checkpoints: Checkpoints,
) -> tuple[TrainState, Evaluation | None]:
    """Runs optimizer steps until `schedule.total`; the last one is always evaluated and saved.

    Args:
      state: after `state.step` updates; donated.
      programs: the compiled step.
      steps: 0-based step and its host microbatches, from `state.step` on.
      objective: the loss, its options and the reference's log-probs.
      schedule: when to save and evaluate.
      evaluate: what a policy does on held-out data, or None without it.
      writer: gets one row per step.
      checkpoints: where states go.
    Returns:
      The last state, and its evaluation; None without held-out data, or if nothing was left to do.
    Raises:
      FloatingPointError: for a loss or gradient that is not finite; names step, examples and last good checkpoint.
      RunStopped: if the first loss is not that of a policy equal to its reference.
    """
    mesh = jax.tree.leaves(state.params)[0].sharding.mesh
    evaluation = None
    with tqdm.tqdm(total=schedule.total, initial=int(state.step), desc="train", unit="step") as bar:
        began = time.perf_counter()
        for step, batches in steps:
            groups = sum(int(batch.group_mask.sum()) for batch in batches)
            microbatches = [
                place_batch(Microbatch(batch, slot_logps(objective.reference, batch)), mesh) for batch in batches
            ]
            state, metrics, losses = run_step(programs, state, microbatches, groups, objective.scalars)
            seconds = time.perf_counter() - began
            if not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all():
                raise FloatingPointError(_not_finite(step + 1, metrics, batches, losses, objective.lines, checkpoints))
            if step == 0 and objective.loss.needs_reference:
                check_first_loss(metrics["loss"], objective)
            row = {
                "step": step + 1,
                **{name: metrics[name] for name in (*METRICS, "grad_norm")},
                "learning_rate": shortest(schedule.learning_rate(step)),
                "tokens": sum(int((batch.group > 0).sum()) for batch in batches),
                "pairs_per_second": groups / seconds,
            }
            last = step + 1 == schedule.total
            if evaluate and (last or (schedule.eval_every and (step + 1) % schedule.eval_every == 0)):
                evaluation = evaluate(state.params)
                row |= evaluation.metrics
            writer.write(row)
            if last or (step + 1) % schedule.save_every == 0:
                checkpoints.save(state)
            bar.set_postfix_str(
                f"loss {row['loss']:.4f}, rewards/accuracies {row['rewards/accuracies']:.2f}, "
                f"rewards/margins {row['rewards/margins']:+.3f}, {row['pairs_per_second']:.2f} pairs/s",
                refresh=False,
            )
            bar.update()
            began = time.perf_counter()
    checkpoints.wait()
    return state, evaluation


def check_first_loss(loss: float, objective: Objective) -> None:
    """RunStopped unless the first loss is that of a policy equal to its reference: ln 2 for DPO."""
    zeros = np.zeros((1, objective.loss.candidates or 2))
    options = {name: objective.scalars[name] for name in objective.loss.options}
    expected = float(objective.loss.fn(zeros, zeros, where=zeros == 0, **options)[0])
    tolerance = FIRST_LOSS_TOLERANCE.get(objective.dtype, 1e-4)
    if abs(loss - expected) > tolerance:
        raise RunStopped(
            f"the loss of the first step is {loss:.6f}; a policy equal to its reference has {expected:.6f} within "
            f"{tolerance:g} in {objective.dtype}: policy and reference are not computed alike; with --dtype bfloat16 "
            "try --dtype float32, otherwise please report it with the model's name"
        )


def _not_finite(
    step: int,
    metrics: Mapping[str, float],
    batches: list[Batch],
    losses: list[Any],
    lines: Sequence[int],
    checkpoints: Checkpoints,
) -> str:
    ids = np.concatenate([batch.example_id[batch.group_mask] for batch in batches])
    values = np.concatenate([np.asarray(loss)[batch.group_mask] for batch, loss in zip(batches, losses, strict=True)])
    culprits = sorted((ids[~np.isfinite(values)] if not np.isfinite(values).all() else ids).tolist())
    of_file = f", lines {[lines[i] for i in culprits]} of the data file" if lines else ""
    checkpoints.wait()
    saved = checkpoints.latest_step
    where = "no checkpoint was saved yet" if saved is None else f"last good: {checkpoints.directory / str(saved)}"
    return (
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}, not finite; "
        f"examples (0-based, as kept) {culprits}{of_file}; {where}; "
        "fix: look at these examples, or lower --learning-rate in another --output-dir"
    )
