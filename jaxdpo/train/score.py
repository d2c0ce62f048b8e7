"""`jaxdpo score`: the rewards of completions under a reward model, as JSON lines."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from jaxdpo import processes
from jaxdpo.config import ScoreConfig
from jaxdpo.data.content import Content
from jaxdpo.data.formats import FORMATS
from jaxdpo.data.layout import choose_capacity
from jaxdpo.data.load import Loaded, load_dataset
from jaxdpo.data.pipeline import all_batches
from jaxdpo.data.sources import open_sources
from jaxdpo.disk import writing
from jaxdpo.hf import load_config, load_reward_model, load_tokenizer
from jaxdpo.hub import resolve_model
from jaxdpo.rewards import DatasetRewards, dataset_rewards, make_reward_program
from jaxdpo.sharding import batch_size_multiple, length_multiple, tokens_apart
from jaxdpo.train.agreement import agree_on_inputs, agree_on_options
from jaxdpo.train.defaults import choose_microbatch_tokens, default_attention, default_dtype, precision
from jaxdpo.train.forecast import layout_costs
from jaxdpo.train.prepare import check_fits, mesh_of
from jaxdpo.types import InputError, Origin


def score(config: ScoreConfig) -> None:
    """Writes one line for each record: prompt, completions best first, their rewards, and where the record stands.

    The lines can be read as rankings by these rewards, their `scores`; messages are written as messages.

    Raises:
      InputError: for a model that is none of rewards, data that cannot be read, or an output that exists.
      RunStopped: if the disk is full or read-only.
    """
    processes.start(config.coordinator, config.num_processes, config.process_id)
    with processes.only_main_prints():
        _score(config, jax.devices())


def _score(config: ScoreConfig, devices: Sequence[jax.Device]) -> None:
    """`score` on processes that are connected."""
    agree_on_options(config)
    output = Path(config.output)
    with processes.together():
        partial = _partial(output) if processes.is_main() else output
    with processes.together():
        open_sources(config.data)  # before a model is downloaded
        source = resolve_model(config.model)
        tokenizer = load_tokenizer(source)
        mesh = mesh_of(config.mesh, devices, load_config(source, head="score"))
        compute_dtype, product_dtype = precision(config.dtype or default_dtype(devices), devices)
        decoder, params = load_reward_model(source, compute_dtype=compute_dtype, mesh=mesh)
        decoder = dataclasses.replace(
            decoder, attention=default_attention(devices, decoder.config), product_dtype=product_dtype
        )
        loaded = _load(config, tokenizer)
        dataset = loaded.dataset
        print(f"data       {loaded.summary()}")
        print(f"tokens     {dataset.summary()}")
        check_fits(dataset, decoder.config)
        tokens = choose_microbatch_tokens(config.microbatch_tokens, [dataset], devices)
    agree_on_inputs(source, {"what --data holds": loaded.digest})
    layout = choose_capacity(
        [dataset],
        [np.arange(len(dataset))[:: -(-len(dataset) // 4096)]],
        max_microbatch_tokens=tokens * tokens_apart(mesh),
        row_multiple=batch_size_multiple(mesh),
        length_multiple=length_multiple(mesh),
        costs=layout_costs(decoder),
    )
    with jax.set_mesh(mesh):
        program, batches = make_reward_program(decoder), all_batches(dataset, layout)
        found = dataset_rewards(program, params, batches, mesh, label="score", total=len(dataset))
    with processes.together():
        if processes.is_main():
            _write(partial, output, _lines(config, loaded, found.rewards))
    _print(found, output)


def _partial(output: Path) -> Path:
    """Where to write before it is renamed; InputError or RunStopped where that is not possible."""
    if output.exists():
        raise InputError(f"--output {output} exists; allowed: a new file; fix: name another, or remove it")
    if not (above := next(path for path in output.absolute().parents if path.exists())).is_dir():
        raise InputError(f"--output {output}: {above} is a file; allowed: a new file in a directory; name another")
    partial = output.with_name(f".{output.name}.partial")
    with writing(output):  # before anything costs time
        output.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
        partial.unlink()
    return partial


def _load(config: ScoreConfig, tokenizer: Any) -> Loaded:
    quiet = None if processes.is_main() else True
    with tqdm.tqdm(desc="tokenize", unit="record", leave=False, disable=quiet) as bar:
        return load_dataset(
            config.data, tokenizer, config.max_length, format=config.format, use="score", progress=bar.update
        )


def _write(partial: Path, output: Path, lines: Iterable[dict[str, Any]]) -> None:
    try:
        with writing(output), open(partial, "w", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _print(found: DatasetRewards, output: Path) -> None:
    """What the rewards are, for people."""
    print(f"rewards    {int(found.mask.sum()):,} completions, mean {found.rewards[found.mask].mean():+.4f}")
    if found.mask.shape[1] > 1:
        ahead = np.sign(found.rewards[:, :1] - found.rewards[:, 1:])[found.mask[:, 1:]]
        share = float((1 + ahead).mean() / 2)
        print(f"accuracy   {share:.4f} of the others, each compared with the first of its record")
    print(f"output     {output}")


def _lines(config: ScoreConfig, loaded: Loaded, rewards: np.ndarray) -> Iterator[dict[str, Any]]:
    """What is written of each record that was scored; the records are read once more for what they say."""
    groups, example = loaded.dataset.groups, 0
    for source, format in zip(open_sources(config.data), loaded.formats, strict=True):
        for number, record in source.records():
            origin = Origin(source.name, number, source.unit)
            if example < len(groups) and origin == groups[example].origin:  # others were dropped
                yield _line(FORMATS[format](record), rewards[example], origin)
                example += 1
    if example < len(groups):
        raise InputError(
            f"{groups[example].origin} is not there any more: the data changed while it was scored; try again"
        )


def _line(content: Content, rewards: np.ndarray, origin: Origin) -> dict[str, Any]:
    others = ("label", "margin", "tools", "chat_template_kwargs")
    return {
        "prompt": content.prompt,
        "completions": list(content.completions),
        "scores": [float(reward) for reward in rewards[: len(content.completions)]],
        **{name: value for name in others if (value := getattr(content, name)) is not None},
        **origin._asdict(),
    }
