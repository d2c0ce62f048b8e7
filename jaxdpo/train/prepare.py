"""A run before its first pass over the data: everything read, chosen and checked, nothing trained."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tqdm

from jaxdpo import processes
from jaxdpo.config import RunConfig
from jaxdpo.data.audit import Audit
from jaxdpo.data.audit_text import summary
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.load import Loaded, load_dataset
from jaxdpo.data.packing import Layout
from jaxdpo.data.plan import StepPlan
from jaxdpo.data.sources import open_sources
from jaxdpo.hf import hf_generation_config, load_config, load_hf, load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.losses import LossSpec
from jaxdpo.models import Decoder, TransformerConfig
from jaxdpo.sharding import batch_size_multiple, length_multiple, make_mesh, mesh_sizes, num_slices, tokens_apart
from jaxdpo.train.agreement import agree_on_inputs
from jaxdpo.train.defaults import choose_microbatch_tokens, default_attention, default_dtype, precision
from jaxdpo.train.digests import tree_digests
from jaxdpo.train.forecast import layout_costs, print_forecast
from jaxdpo.train.loop import Schedule
from jaxdpo.train.memory import choose_remat, state_bytes
from jaxdpo.train.objective import Task
from jaxdpo.train.optimizer import make_optimizer, warmup_schedule
from jaxdpo.train.profile import steps_to_profile
from jaxdpo.train.run_dir import RunDir, stated
from jaxdpo.types import InputError

SAVES = 10
"""Checkpoints of a run, unless `save_every` says otherwise."""


class Data(NamedTuple):
    """What `--data` or `--eval-data` names, read and tokenised."""

    loaded: Loaded
    dataset: TokenizedDataset
    """What is trained on: the loaded one, as the recipe adapts it."""


class Recipe(NamedTuple):
    """What one kind of training does its own way."""

    choose_loss: Callable[[Any, Sequence[TokenizedDataset]], LossSpec]
    """What is minimised on training and held-out data; InputError for data that it cannot be made of."""
    scalars: Callable[[Any], dict[str, Any]]
    """The options that the loss is called with, by name."""
    load: Callable[..., tuple[Any, dict]]
    """`(configuration, directory, *, compute_dtype, mesh) -> decoder, parameters`."""
    task: Callable[[Decoder, LossSpec], Task]
    """Of the decoder and the loss."""
    export: Callable[[RunDir, "Prepared", dict], None]
    """Writes the model with these parameters to the run's `export/`."""
    head: Literal["lm", "score"] = "lm"
    """What the model ends in."""
    check: Callable[[Any], None] = lambda config: None
    """InputError for options of a configuration that do not go together; called before anything is read."""
    selection: Callable[[Any], dict[str, Any]] = lambda config: {}
    """Keywords of `load_dataset` that say what of the data is trained on."""
    adapt: Callable[[Any, TokenizedDataset], TokenizedDataset] = lambda config, dataset: dataset
    """What is trained on, of the configuration and the data as they were read."""
    start: Callable[["Prepared"], dict] = lambda ready: ready.params
    """The parameters that training starts from, of those that were loaded."""
    keep_best: str | None = None
    """The metric of held-out data by which the exported checkpoint is chosen; None: the last one."""


class Prepared(NamedTuple):
    """A run before its first pass over the data: everything checked, nothing trained."""

    config: RunConfig
    """Resolved: nothing is left to be chosen."""
    data: list[Data]
    """The training data and, where there is one, the held-out data."""
    loss: LossSpec
    """What is minimised on them."""
    source: Path
    """Directory that the model was read from."""
    tokenizer: Any
    model: Decoder
    params: dict
    layout: Layout
    order: StepPlan
    schedule: Schedule
    mesh: jax.sharding.Mesh
    meta: dict[str, Any]
    """Saved with every checkpoint."""


def prepare(config: RunConfig, recipe: Recipe, devices: Sequence[jax.Device]) -> Prepared:
    """Reads data and model, chooses the layout and prints the plan; writes nothing.

    Args:
      config: as claimed by `claim`.
      recipe: what is trained.
      devices: where it will run.
    Raises:
      InputError: for whatever of it cannot be used.
    """
    with processes.together():
        recipe.check(config)
        names = [name for name in (config.data, config.eval_data) if name is not None]
        for name in names:
            open_sources(name)  # before a model is downloaded
        source = resolve_model(config.model)
        print(f"model      {config.model}, from {source}")
        architecture = load_config(source, head=recipe.head)
        mesh = mesh_of(config.mesh, devices, architecture)
        tokenizer = load_tokenizer(source)
        hf_generation_config(source)  # kept with the run: one that is damaged is found before anything is written
        shares = (config.data_shares, None)  # held-out data is seen as it is
        data = [_load(*item, tokenizer, config, recipe) for item in zip(names, shares, strict=False)]
        for _, dataset in data:
            check_fits(dataset, architecture)
        loss = recipe.choose_loss(config, [item.dataset for item in data])

        dtype = config.dtype or default_dtype(devices)
        compute_dtype, product_dtype = precision(dtype, devices)
        model, params = recipe.load(config, source, compute_dtype=compute_dtype, mesh=mesh)
        attention = config.attention or default_attention(devices, architecture)
        model = dataclasses.replace(model, attention=attention, product_dtype=product_dtype)
        datasets, lengths = [item.dataset for item in data], config.lengths_of_rows
        microbatch_tokens = choose_microbatch_tokens(config.microbatch_tokens, datasets, devices, lengths)
        order, layout = _steps(config, datasets, model, mesh, microbatch_tokens)
    options = ("--data", "--eval-data")
    agree_on_inputs(source, {f"what {of} holds": item.loaded.digest for of, item in zip(options, data, strict=False)})
    state = _state_bytes(config, params, datasets[0], layout, order)
    if config.remat is None:
        model = choose_remat(model, layout, state, mesh)
    else:
        model = dataclasses.replace(model, remat=config.remat)
    epochs = config.epochs or (1 if config.max_steps is None else None)
    total = config.max_steps or order.num_steps_per_epoch * (epochs or 1)
    steps_to_profile(config.profiled_steps, 0, total)
    save_every = config.save_every or math.ceil(total / SAVES)
    config = dataclasses.replace(
        config,
        dtype=dtype,
        attention=model.attention,
        remat=model.remat,
        epochs=epochs,
        row_lengths=",".join(map(str, layout.row_lengths)),
        microbatch_tokens=microbatch_tokens,
        save_every=save_every,
    )
    print_forecast(config, loss, model, params, state, datasets, layout, order, total)
    meta = {
        "config": stated(config),
        "head": recipe.head,
        "data": [item.loaded.content for item in data],
        "tokens": [item.loaded.digest for item in data],
        "initial_params": tree_digests(params),
    }
    learning_rate = warmup_schedule(config.learning_rate, config.warmup_steps)
    eval_every = config.eval_every or (save_every if recipe.keep_best and config.eval_data else None)
    schedule = Schedule(total, save_every, eval_every, learning_rate, recipe.keep_best is not None)
    return Prepared(config, data, loss, source, tokenizer, model, params, layout, order, schedule, mesh, meta)


def _steps(
    config: RunConfig,
    datasets: Sequence[TokenizedDataset],
    model: Decoder,
    mesh: jax.sharding.Mesh,
    microbatch_tokens: int,
) -> tuple[StepPlan, Layout]:
    """Which groups are in which step, and the shapes of their batches."""
    order = StepPlan(
        datasets[0].sizes, config.batch_size, seed=config.seed, shuffle=config.shuffle, weights=config.data_shares
    )
    layout = choose_capacity(
        datasets,
        order.sampled_steps(),
        max_microbatch_tokens=microbatch_tokens * tokens_apart(mesh),
        row_multiple=batch_size_multiple(mesh),
        length_multiple=length_multiple(mesh),
        row_lengths=config.lengths_of_rows,
        costs=layout_costs(model),
    )
    return order, layout


def mesh_of(mesh: str, devices: Sequence[jax.Device], architecture: TransformerConfig) -> jax.sharding.Mesh:
    """The mesh of `--mesh`; for auto as many devices as divide the model's width split the parameters."""
    if mesh == "auto":
        return make_mesh(devices, fsdp=math.gcd(len(devices) // num_slices(devices), architecture.embed_dim))
    try:
        return make_mesh(devices, **mesh_sizes(mesh))
    except InputError as error:
        raise InputError(f"--mesh: {error}") from None


def _state_bytes(config: RunConfig, params: dict, dataset: TokenizedDataset, layout: Layout, order: StepPlan) -> int:
    """`state_bytes` of a run."""
    steps = order.sampled_steps()
    several = any(len(layout.divide(dataset.tokens[step], dataset.slots[step])) > 1 for step in steps)
    copies = int(config.reference_at_every_step)
    return state_bytes(params, make_optimizer(config), accumulates=several, copies=copies)


def load_policy(config: RunConfig, source: Path, **placement: Any) -> tuple[Decoder, dict]:
    """`Recipe.load` of a language model."""
    del config
    return load_hf(source, **placement)


def _load(name: str, weights: tuple[float, ...] | None, tokenizer: Any, config: RunConfig, recipe: Recipe) -> Data:
    """What a text of `--data` names; prints what it holds."""
    quiet = None if processes.is_main() else True
    with tqdm.tqdm(desc="tokenize", unit="record", leave=False, disable=quiet) as bar:
        loaded = load_dataset(
            name,
            tokenizer,
            config.max_length,
            format=config.format,
            weights=weights,
            audit=Audit(tokenizer),
            progress=bar.update,
            **recipe.selection(config),
        )
    print(f"data       {loaded.summary()}")
    print(f"tokens     {loaded.dataset.summary()}")
    if loaded.dataset.dropped.total > len(loaded.dataset.dropped.first):
        print(f"           all that was dropped is named in {loaded.directory / 'dropped.jsonl'}")
    if loaded.audit is not None:
        print(*summary(loaded.audit), sep="\n")
    return Data(loaded, recipe.adapt(config, loaded.dataset))


def check_fits(dataset: TokenizedDataset, architecture: TransformerConfig) -> None:
    """InputError, naming the record, for a path beyond the model's positions or a token beyond its vocabulary."""
    positions, vocabulary = architecture.max_positions, architecture.vocab_size
    longest, largest = int(dataset.longest_path.argmax()), int(dataset.largest_id.argmax())
    if dataset.longest_path[longest] > positions:
        raise InputError(
            f"{dataset.groups[longest].origin}: prompt and completion have {dataset.longest_path[longest]} tokens; "
            f"allowed: the model's {positions} positions; fix: --max-length {positions}, which cuts and counts"
        )
    if dataset.largest_id[largest] >= vocabulary:
        raise InputError(
            f"{dataset.groups[largest].origin}: the tokenizer gives id {dataset.largest_id[largest]}; allowed: below "
            f"the model's vocabulary of {vocabulary}; fix: use the model's own tokenizer, or resize its embeddings"
        )
