"""One DPO run, from raw records to an exported Hugging Face directory. It reads top to bottom."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tqdm

from jaxdpo import plots
from jaxdpo.config import DPOConfig
from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.packing import Layout
from jaxdpo.data.pipeline import StepPlan, first_epoch, prefetched
from jaxdpo.data.sources import LoadedPreferences, load_preferences
from jaxdpo.data.tokenize import TokenizedDataset, tokenize_dataset
from jaxdpo.hf import load_config, load_hf, load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.losses import LOSSES
from jaxdpo.models import Decoder, TransformerConfig
from jaxdpo.reference import dataset_logps, make_logp_program
from jaxdpo.sharding import batch_size_multiple, make_mesh
from jaxdpo.train.checkpoint import Checkpoints, read_meta, tree_digests
from jaxdpo.train.evaluation import Evaluation, held_out_evaluation
from jaxdpo.train.export import keep_model_files, write_export
from jaxdpo.train.forecast import print_forecast
from jaxdpo.train.loop import Objective, Schedule, train
from jaxdpo.train.optimizer import make_optimizer, warmup_schedule
from jaxdpo.train.run_dir import RunDir, claim, write_config
from jaxdpo.train.state import TrainState, init_state
from jaxdpo.train.step import make_programs
from jaxdpo.train.writer import MetricsWriter, read_metrics
from jaxdpo.types import InputError

MICROBATCH_TOKENS = {"cpu": 2048}
MICROBATCH_TOKENS_ELSEWHERE = 16384
"""Most tokens of one forward pass per device, by platform, unless `microbatch_tokens` says otherwise."""
SAVES = 10
"""Checkpoints of a run, unless `save_every` says otherwise."""


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


class Data(NamedTuple):
    """A data file, read and tokenised."""

    loaded: LoadedPreferences
    dataset: TokenizedDataset


class Prepared(NamedTuple):
    """A run before its first pass over the data: everything checked, nothing trained."""

    config: DPOConfig
    """Resolved: nothing is left to be chosen."""
    data: list[Data]
    """The training data and, where there is one, the held-out data."""
    model: Path
    """Directory it was read from."""
    tokenizer: Any
    decoder: Decoder
    params: dict
    layout: Layout
    order: StepPlan
    schedule: Schedule
    mesh: jax.sharding.Mesh
    meta: dict[str, Any]
    """Saved with every checkpoint."""


def run_dpo(config: DPOConfig, *, devices: Sequence[jax.Device] | None = None) -> RunResult:
    """Trains a policy by DPO, or continues to, and exports it.

    Args:
      config: what `jaxdpo dpo` takes.
      devices: where to run; all devices by default.
    Raises:
      InputError: for bad input: model, data, directory or options.
      FloatingPointError: for a loss or gradient that is not finite.
      RunStopped: if policy and reference are not computed alike: the first loss is not ln 2.
    """
    began = time.perf_counter()
    config, run = claim(config), RunDir(Path(config.output_dir))
    ready = prepare(config, jax.devices() if devices is None else devices)
    config, data, schedule = ready.config, ready.data, ready.schedule
    decoder, layout, order, mesh = ready.decoder, ready.layout, ready.order, ready.mesh
    run.create()
    with jax.set_mesh(mesh), contextlib.closing(Checkpoints(run.checkpoints, ready.meta)) as checkpoints:
        start = _starting_step(checkpoints, schedule.total)
        write_config(run, config)
        keep_model_files(run, ready.model, ready.tokenizer)
        program = make_logp_program(decoder)
        loss, scalars = LOSSES[config.loss], {"beta": config.beta, "label_smoothing": config.label_smoothing}
        before = held_out = None
        if len(data) > 1:
            before, held_out = held_out_evaluation(loss, scalars, program, ready.params, data[1].dataset, layout, mesh)
        seen = first_epoch(data[0].dataset, order, layout, schedule.total if start < schedule.total else 0)
        total = min(len(data[0].dataset), schedule.total * config.batch_size)
        reference = dataset_logps(program, ready.params, seen, mesh, label="reference", total=total)
        lines = [group.line for group in data[0].dataset.groups]
        objective = Objective(loss, scalars, reference, decoder.compute_dtype, lines)
        optimizer = make_optimizer(config)
        state = init_state(ready.params, optimizer, mesh)  # the first step donates them
        if start:
            state = _resumed(state, checkpoints)
        with contextlib.closing(MetricsWriter(run.metrics, resume_step=start)) as writer:
            if before is not None and start == 0:
                writer.write({"step": 0, **before.metrics})
            state, after = train(
                state,
                make_programs(decoder, loss, optimizer, jax.tree.map(lambda x: x.sharding, state)),
                prefetched(data[0].dataset, order, layout, start, schedule.total),
                objective,
                schedule,
                evaluate=held_out,
                writer=writer,
                checkpoints=checkpoints,
            )
        if held_out is not None and after is None:  # the run was complete already
            after = held_out(state.params)
        write_export(run.export, decoder, state.params, run, overwrite=True)
        plots.save_curves(
            read_metrics(run.metrics), run.curves, title=f"{config.model}, DPO on {Path(config.data).name}"
        )
    return RunResult(schedule.total, before, after, time.perf_counter() - began)


def prepare(config: DPOConfig, devices: Sequence[jax.Device]) -> Prepared:
    """Reads data and model, chooses the layout and prints the plan; writes nothing.

    Args:
      config: as claimed by `claim`.
      devices: where it will run. As many of them as divide the model's width split the parameters.
    Raises:
      InputError: for whatever of it cannot be used.
    """
    paths = [path for path in (config.data, config.eval_data) if path is not None]
    loaded = [load_preferences(path, config.format) for path in paths]
    for item in loaded:
        print(f"data       {item.summary()}")
    model = resolve_model(config.model)
    print(f"model      {config.model}, from {model}")
    architecture = load_config(model)
    tokenizer = load_tokenizer(model)
    data = [Data(item, _tokenize(item, tokenizer, config.max_length)) for item in loaded]
    for _, dataset in data:
        _check_fits(dataset, architecture)

    mesh = make_mesh(devices, fsdp=math.gcd(len(devices), architecture.embed_dim))
    platform = devices[0].platform
    dtype = config.dtype or ("float32" if platform == "cpu" else "bfloat16")
    decoder, params = load_hf(model, compute_dtype=dtype, mesh=mesh)
    microbatch_tokens = config.microbatch_tokens or MICROBATCH_TOKENS.get(platform, MICROBATCH_TOKENS_ELSEWHERE)
    order = StepPlan(len(data[0].dataset), config.batch_size, seed=config.seed, shuffle=config.shuffle)
    layout = choose_capacity(
        [item.dataset for item in data],
        order.sampled_steps(),
        max_microbatch_tokens=microbatch_tokens * batch_size_multiple(mesh),
        row_multiple=batch_size_multiple(mesh),
        row_length=config.row_length,
    )
    epochs = config.epochs or (1 if config.max_steps is None else None)
    total = config.max_steps or order.num_steps_per_epoch * (epochs or 1)
    save_every = config.save_every or math.ceil(total / SAVES)
    config = dataclasses.replace(
        config,
        dtype=dtype,
        epochs=epochs,
        row_length=layout.capacity.length,
        microbatch_tokens=microbatch_tokens,
        save_every=save_every,
    )
    print_forecast(config, decoder, params, [item.dataset for item in data], layout, order, total)
    meta = {
        "config": dataclasses.asdict(config),
        "data": [item.loaded.digest for item in data],
        "initial_params": tree_digests(params),
    }
    learning_rate = warmup_schedule(config.learning_rate, config.warmup_steps)
    schedule = Schedule(total, save_every, config.eval_every, learning_rate)
    return Prepared(config, data, model, tokenizer, decoder, params, layout, order, schedule, mesh, meta)


def _tokenize(loaded: LoadedPreferences, tokenizer: Any, max_length: int) -> TokenizedDataset:
    with tqdm.tqdm(total=len(loaded.preferences), desc="tokenize", unit="pair", leave=False, disable=None) as bar:
        dataset = tokenize_dataset(loaded.preferences, tokenizer, max_length, progress=bar.update)
    print(f"tokens     {loaded.path}: {dataset.summary()}")
    return dataset


def _check_fits(dataset: TokenizedDataset, architecture: TransformerConfig) -> None:
    """InputError, naming file and line, for a path beyond the model's positions or a token beyond its vocabulary."""
    positions, vocabulary = architecture.max_positions, architecture.vocab_size
    for group in dataset.groups:
        if group.longest_path > positions:
            raise InputError(
                f"{group.source}, line {group.line}: prompt and completion have {group.longest_path} tokens; allowed: "
                f"the model's {positions} positions; fix: --max-length {positions}, which cuts and counts"
            )
        largest = max(int(ids.max()) for ids in (group.prompt, *group.completions))
        if largest >= vocabulary:
            raise InputError(
                f"{group.source}, line {group.line}: the tokenizer gives id {largest}; allowed: below the model's "
                f"vocabulary of {vocabulary}; fix: use the model's own tokenizer, or resize its embeddings"
            )


def _starting_step(checkpoints: Checkpoints, total: int) -> int:
    """Step of the latest checkpoint, 0 without one; InputError if model or data are not those it was saved with."""
    if checkpoints.latest_step is None:
        return 0
    path = checkpoints.directory / str(checkpoints.latest_step)
    saved = read_meta(path)
    for name, what in (("data", "data files"), ("initial_params", "model's weights")):
        if saved[name] != checkpoints.meta[name]:
            raise InputError(
                f"{path} was trained from other {what} than these; allowed: the same; fix: bring back the {what} of "
                "that run, or give another --output-dir"
            )
    if saved["step"] > total:
        raise InputError(
            f"{path} is past the {total} steps asked for; allowed: at least {saved['step']}; fix: raise --max-steps "
            "or --epochs, or export an earlier checkpoint with `jaxdpo export`"
        )
    print(f"resume     step {saved['step']} of {total}, from {path}")
    return saved["step"]


def _resumed(state: TrainState, checkpoints: Checkpoints) -> TrainState:
    """The latest checkpoint's state in place of `state`, whose memory is given back first."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)
    return checkpoints.restore(like)
