"""What all libraries are given: the weights, the pairs with their ids, and the work that they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from peers.summary import Work

from jaxdpo import load_dataset, load_hf, load_tokenizer, make_mesh, resolve_model, save_hf
from jaxdpo.hf import load_config
from jaxdpo.types import InputError

FIELDS = ("prompt", "chosen", "rejected")


def export_model(name: str, directory: Path) -> Path:
    """The model as a float32 Hugging Face directory, written unless it is there."""
    if not (directory / "config.json").exists():
        source = resolve_model(name)
        decoder, params = load_hf(source, mesh=make_mesh(jax.devices()[:1]))
        save_hf(directory, decoder, params, tokenizer=load_tokenizer(source))
    return directory


def usable_pairs(data: str, model: Path, count: int, limits: tuple[int, int, int]) -> tuple[list[dict[str, Any]], int]:
    """The first pairs of the data that no library has to cut, in file order.

    Args:
      data: anything that jaxdpo reads.
      model: a directory with the tokenizer.
      count: how many.
      limits: most tokens of a path, of a prompt and of a completion with its EOS. Libraries cut in different ways.
    Returns:
      The pairs as text and ids, and how many longer ones stood among them.
    Raises:
      InputError: if there are not enough.
    """
    longest, prompt, completion = limits
    tokenizer = load_tokenizer(model)
    dataset = load_dataset(data, tokenizer, 2**30).dataset
    records, left_out = [], 0
    for group in dataset.groups:
        if len(records) == count:
            break
        sizes = [len(ids) for ids in group.completions]
        if max(sizes) > completion or len(group.prompt) > prompt or len(group.prompt) + max(sizes) > longest:
            left_out += 1
            continue
        records.append(_record(group, tokenizer))
    if len(records) < count:
        raise InputError(
            f"{data} has {len(records)} usable pairs; needed: {count}, pairs of a step times rounds and one step "
            "more; give more data, or lower --rounds or --pairs-per-step"
        )
    return records, left_out


def _record(group: Any, tokenizer: Any) -> dict[str, Any]:
    """A pair as text, without the EOS that every library adds, and as ids, with it."""
    parts = dict(zip(FIELDS, (group.prompt, *group.completions), strict=True))
    ids = {f"{name}_ids": part.tolist() for name, part in parts.items()}
    text = {
        name: tokenizer.decode(part if name == "prompt" else part[:-1], clean_up_tokenization_spaces=False)
        for name, part in parts.items()
    }
    return text | ids


def step_work(model: Path, records: Sequence[dict[str, Any]]) -> Work:
    """What a step on these pairs has to do."""
    config = load_config(model)
    attention = config.embed_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    mlp = config.embed_dim * config.mlp_dim * (3 if config.gated_mlp else 2)
    scored = sum(len(record["chosen_ids"]) + len(record["rejected_ids"]) for record in records)
    return Work(
        pairs=len(records),
        tree_tokens=scored + sum(len(record["prompt_ids"]) for record in records),
        scored_tokens=scored,
        body_parameters=config.num_layers * (attention + mlp),
        head_parameters=config.vocab_size * config.embed_dim,
    )
