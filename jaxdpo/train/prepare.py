"""A run before its first pass over the data: everything read, chosen and checked, nothing trained."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tqdm

from jaxdpo.config import DPOConfig
from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.packing import Layout
from jaxdpo.data.partners import with_partners
from jaxdpo.data.pipeline import StepPlan
from jaxdpo.data.sources import LoadedPreferences, load_preferences
from jaxdpo.data.tokenize import TokenizedDataset, tokenize_dataset
from jaxdpo.hf import load_config, load_hf, load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.losses import LossSpec
from jaxdpo.models import Decoder, TransformerConfig
from jaxdpo.sharding import batch_size_multiple, make_mesh
from jaxdpo.train.checkpoint import tree_digests
from jaxdpo.train.choose import check_objective, choose_loss, needs_partners
from jaxdpo.train.forecast import print_forecast
from jaxdpo.train.loop import Schedule
from jaxdpo.train.optimizer import warmup_schedule
from jaxdpo.types import InputError

MICROBATCH_TOKENS = {"cpu": 2048}
MICROBATCH_TOKENS_ELSEWHERE = 16384
"""Most tokens of one forward pass per device, by platform, unless `microbatch_tokens` says otherwise."""
SAVES = 10
"""Checkpoints of a run, unless `save_every` says otherwise."""


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
    loss: LossSpec
    """What is minimised on them."""
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


def prepare(config: DPOConfig, devices: Sequence[jax.Device]) -> Prepared:
    """Reads data and model, chooses the layout and prints the plan; writes nothing.

    Args:
      config: as claimed by `claim`.
      devices: where it will run. As many of them as divide the model's width split the parameters.
    Raises:
      InputError: for whatever of it cannot be used.
    """
    check_objective(config)
    paths = [path for path in (config.data, config.eval_data) if path is not None]
    loaded = [load_preferences(path, config.format) for path in paths]
    for item in loaded:
        print(f"data       {item.summary()}")
    model = resolve_model(config.model)
    print(f"model      {config.model}, from {model}")
    architecture = load_config(model)
    tokenizer = load_tokenizer(model)
    data = [Data(item, _tokenize(item, tokenizer, config)) for item in loaded]
    for _, dataset in data:
        _check_fits(dataset, architecture)
    loss = choose_loss(config, [item.dataset for item in data])

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
    print_forecast(config, loss, decoder, params, [item.dataset for item in data], layout, order, total)
    meta = {
        "config": dataclasses.asdict(config),
        "data": [item.loaded.digest for item in data],
        "initial_params": tree_digests(params),
    }
    learning_rate = warmup_schedule(config.learning_rate, config.warmup_steps)
    schedule = Schedule(total, save_every, config.eval_every, learning_rate)
    return Prepared(config, data, loss, model, tokenizer, decoder, params, layout, order, schedule, mesh, meta)


def _tokenize(loaded: LoadedPreferences, tokenizer: Any, config: DPOConfig) -> TokenizedDataset:
    with tqdm.tqdm(total=len(loaded.preferences), desc="tokenize", unit="pair", leave=False, disable=None) as bar:
        dataset = tokenize_dataset(loaded.preferences, tokenizer, config.max_length, progress=bar.update)
    print(f"tokens     {loaded.path}: {dataset.summary()}")
    return with_partners(dataset, config.max_length) if needs_partners(config, dataset) else dataset


def _check_fits(dataset: TokenizedDataset, architecture: TransformerConfig) -> None:
    """InputError, naming file and line, for a path beyond the model's positions or a token beyond its vocabulary."""
    positions, vocabulary = architecture.max_positions, architecture.vocab_size
    for group in dataset.groups:
        if group.longest_path > positions:
            raise InputError(
                f"{group.origin}: prompt and completion have {group.longest_path} tokens; allowed: "
                f"the model's {positions} positions; fix: --max-length {positions}, which cuts and counts"
            )
        largest = max(int(ids.max()) for ids in (group.prompt, *group.completions))
        if largest >= vocabulary:
            raise InputError(
                f"{group.origin}: the tokenizer gives id {largest}; allowed: below the model's "
                f"vocabulary of {vocabulary}; fix: use the model's own tokenizer, or resize its embeddings"
            )
