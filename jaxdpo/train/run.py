"""One training run, from raw records to an exported Hugging Face directory. It reads top to bottom."""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdpo import plots, processes
from jaxdpo.config import DPOConfig, RunConfig
from jaxdpo.data.pipeline import prefetched
from jaxdpo.disk import writing
from jaxdpo.reference import FrozenReference, LogpProgram, TokenLogps, make_logp_program
from jaxdpo.reference_cache import reference_facts, stored_logps, tokens_digest
from jaxdpo.train.agreement import claim_together, create_together
from jaxdpo.train.checkpoint import Checkpoints, abstract, load_params, read_meta
from jaxdpo.train.evaluation import Evaluation, held_out_evaluation
from jaxdpo.train.export import keep_model_files
from jaxdpo.train.flops import peak_of, useful_flops
from jaxdpo.train.loggers import Loggers, check_loggers, open_loggers
from jaxdpo.train.loop import MovingReference, Objective, train
from jaxdpo.train.memory import memory_advice
from jaxdpo.train.optimizer import make_optimizer
from jaxdpo.train.prepare import Data, Prepared, Recipe, prepare
from jaxdpo.train.profile import Profile, steps_to_profile
from jaxdpo.train.run_dir import RunDir, stated, stored_config, write_config
from jaxdpo.train.state import TrainState, init_state
from jaxdpo.train.step import make_programs
from jaxdpo.train.stopwatch import Compilations, Stopwatch
from jaxdpo.train.watch import Usage, Watch
from jaxdpo.train.writer import last_step, read_metrics
from jaxdpo.types import InputError

REF_MODEL_MIXUP_ALPHA = 0.6
"""How far a moving reference moves, unless `ref_model_mixup_alpha` says otherwise: TRL's default."""


class RunResult(NamedTuple):
    """What a run leaves in memory; the rest lies in its directory."""

    steps: int
    """Optimizer steps done in all."""
    before: Evaluation | None
    """Held-out pairs under the reference; None without held-out data."""
    after: Evaluation | None
    """Held-out pairs under the trained policy."""
    seconds: float
    """Of this call, from its first line to the export."""
    usage: Usage | None
    """Of time and devices until the end of training; None if there were no steps left to do."""


def run_training(config: RunConfig, recipe: Recipe, *, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Trains a model, or continues to, and exports it.

    Args:
      config: of the run.
      recipe: what this kind of training does its own way.
      devices: where to run; all devices by default.
    Raises:
      InputError: for bad input: model, data, directory or options.
      FloatingPointError: for a loss or gradient that is not finite.
      RunInterrupted: after Ctrl-C or SIGTERM in training.
      RunStopped: if policy and reference are not computed alike: the first loss is not that of equal ones; or if a
        disk is full or read-only, or a device out of memory.
    """
    with Compilations() as compilations:
        stopwatch = Stopwatch(compilations)
        processes.start(config.coordinator, config.num_processes, config.process_id)
        with processes.only_main_prints():
            return _run(config, recipe, jax.devices() if devices is None else devices, stopwatch)


def _run(config: RunConfig, recipe: Recipe, devices: Sequence[jax.Device], stopwatch: Stopwatch) -> RunResult:
    """`run_training` on processes that are connected, its time told by phase."""
    with processes.together():
        if processes.is_main():
            check_loggers(config.loggers)
    config, run = claim_together(config), RunDir(Path(config.output_dir))
    with processes.together():  # before the file is written anew
        again = run.config.exists() and stored_config(run, type(config)).profile == config.profile
    ready = prepare(config, recipe, devices)
    config, data, schedule, loss = ready.config, ready.data, ready.schedule, ready.loss
    layout, order, mesh, scalars = ready.layout, ready.order, ready.mesh, recipe.scalars(ready.config)
    task = recipe.task(ready.model, loss)
    create_together(run)
    with (
        jax.set_mesh(mesh),
        memory_advice(config),
        contextlib.closing(Checkpoints(run.checkpoints, ready.meta, keep_best=recipe.keep_best)) as checkpoints,
    ):
        start = _starting_step(checkpoints, schedule.total)
        traced = steps_to_profile(config.profiled_steps, start, schedule.total, again=again)
        profile = Profile(run.profile, traced if processes.is_main() else range(0))
        with processes.together():
            if processes.is_main():
                write_config(run, config)
                keep_model_files(run, ready.source, ready.tokenizer)
        optimizer = make_optimizer(config)
        params = ready.params if start else recipe.start(ready)  # a resumed run has its own below
        stopwatch.lap("start")
        reference = _reference(config, ready, start)
        stopwatch.lap("reference")
        state = init_state(params, optimizer, mesh, loss=loss, moving_reference=_moving(config))
        del params
        before = held_out = None
        stopwatch.lap("start")
        if len(data) > 1:
            before, held_out = held_out_evaluation(
                task, scalars, data[1].dataset, layout, state, reference=reference.held_out
            )
        stopwatch.lap("evaluation")
        objective = Objective(loss, scalars, reference.training, str(config.dtype), data[0].dataset.groups)
        if start:
            state = _resumed(state, checkpoints)
        redone = last_step(run.metrics) if processes.is_main() else 0  # before the rows behind the checkpoint are cut
        with contextlib.closing(_loggers(config, run, start)) as writer:
            if before is not None and start == 0:
                writer.write({"step": 0, **before.metrics})
            stopwatch.lap("start")
            flops = functools.partial(useful_flops, ready.model.config, reference=config.reference_at_every_step)
            peak = peak_of(mesh.local_devices[0], str(ready.model.multiplied_dtype))
            watch = Watch(stopwatch, flops, peak, mesh, profile, redone=redone)
            state, after = train(
                state,
                make_programs(task, optimizer, jax.tree.map(lambda x: x.sharding, state)),
                prefetched(data[0].dataset, order, layout, start, schedule.total),
                objective,
                schedule,
                evaluate=held_out,
                writer=writer,
                checkpoints=checkpoints,
                watch=watch,
            )
            usage = watch.usage()
        best = checkpoints.best_step if recipe.keep_best else None
        if best not in (None, schedule.total):
            print(f"best       step {best}: highest {recipe.keep_best}")
            state, after = _best(state, checkpoints.directory / str(best)), None
        if held_out is not None and after is None:  # of the best, or the run was complete already
            after = held_out(state)
        recipe.export(run, ready, state.params)
        title = f"{config.model}, {config.objective} on {Path(config.data).name}"
        with processes.together(), writing(run.curves):
            if processes.is_main():
                plots.save_curves(read_metrics(run.metrics), run.curves, title=title)
    return RunResult(schedule.total, before, after, stopwatch.elapsed, usage)


def _loggers(config: RunConfig, run: RunDir, start: int) -> Loggers:
    """Where the rows of a run go; on other processes than 0 nowhere."""
    writer = Loggers()
    with processes.together():
        if processes.is_main():
            name = config.run_name or run.root.absolute().name
            writer = open_loggers(config.loggers, run.root, run_name=name, config=stated(config), resume_step=start)
    return writer


def _moving(config: RunConfig) -> bool:
    """Whether the reference follows the policy."""
    return isinstance(config, DPOConfig) and config.ref_model_sync_steps is not None


class Reference(NamedTuple):
    """What a policy is held against."""

    training: TokenLogps | FrozenReference | MovingReference | None = None
    """In training; None without a reference."""
    held_out: np.ndarray | None = None
    """`[examples, candidates]` log-probs of the held-out groups, nats; None where they are not stored."""


def _reference(config: RunConfig, ready: Prepared, start: int) -> Reference:
    """The reference of a run that goes on from a step: its stored log-probs, unless it is evaluated at every step."""
    if not ready.loss.needs_reference:
        return Reference()
    assert isinstance(config, DPOConfig)
    program = make_logp_program(ready.model)
    if config.ref_model_sync_steps is not None:
        mixup = REF_MODEL_MIXUP_ALPHA if config.ref_model_mixup_alpha is None else config.ref_model_mixup_alpha
        return Reference(MovingReference(program, config.ref_model_sync_steps, mixup))
    if not config.precompute_ref_log_probs:
        return Reference(FrozenReference(program, jax.tree.map(jnp.copy, ready.params)))
    training = held_out = None
    if start < ready.schedule.total:
        seen = ready.order.groups_of_steps(start, ready.schedule.total)
        training = _stored(ready, program, ready.data[0], seen)
    for data in ready.data[1:]:
        logps = _stored(ready, program, data, np.arange(len(data.dataset)), of="held out: ")
        held_out = logps.sums(data.dataset.completion_lengths(), tail_weight=config.ld_alpha)
    return Reference(training, held_out)


def _stored(ready: Prepared, program: LogpProgram, data: Data, examples: np.ndarray, *, of: str = "") -> TokenLogps:
    """The reference's log-probs of some groups, from the cache as far as it has them; says how far."""
    facts = reference_facts(
        ready.model,
        ready.meta["initial_params"],
        tokens_digest(data.loaded, data.dataset),
        ready.mesh.devices.flat[0].platform,
    )
    stored = stored_logps(
        program, ready.params, data.dataset, examples, ready.layout, ready.mesh, facts=facts, label="reference"
    )
    there = len(examples) - stored.computed
    print(f"reference  {of}computed for {stored.computed:,} groups, {there:,} from the cache {stored.directory}")
    return stored.logps


def _starting_step(checkpoints: Checkpoints, total: int) -> int:
    """Step of the latest checkpoint, 0 without one; InputError if model or data are not those it was saved with."""
    latest = checkpoints.latest_step
    if latest is None:
        return 0
    path = checkpoints.directory / str(latest)
    saved = read_meta(path)
    for name, what in (
        ("data", "data"),
        ("tokens", "tokens of the same data (another tokenizer, or a chat template that writes the day's date)"),
        ("initial_params", "model's weights"),
    ):
        if saved[name] != checkpoints.meta[name]:
            raise InputError(
                f"{path} was trained from other {what} than these; allowed: the same; fix: bring back those of that "
                "run, or give another --output-dir"
            )
    if saved["step"] > total:
        raise InputError(
            f"{path} is past the {total} steps asked for; allowed: at least {saved['step']}; fix: raise --max-steps "
            "or --epochs, or export an earlier checkpoint with `jaxdpo export`"
        )
    print(f"resume     step {saved['step']} of {total}, from {path}")
    return saved["step"]


def _best(state: TrainState, checkpoint: Path) -> TrainState:
    """The last state with a checkpoint's parameters."""
    like = abstract(state.params)
    jax.tree.map(lambda x: x.delete(), state.params)
    return state._replace(params=load_params(checkpoint, like))


def _resumed(state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The latest checkpoint's state in place of `state`, whose memory is given back first."""
    like = abstract(state)
    jax.tree.map(lambda x: x.delete(), state)
    return checkpoints.restore(like)
