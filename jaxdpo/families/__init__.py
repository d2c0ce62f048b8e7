"""Model families: how checkpoints of each Hugging Face `model_type` are read and written. A family is a line here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxdpo.families.fields import hf_labels
from jaxdpo.families.gpt2 import GPT2
from jaxdpo.families.llama import LLAMA, MISTRAL
from jaxdpo.families.table import Family, Weight
from jaxdpo.families.transfer import Tensors, export_tensors, load_params, split_shards, table_shapes
from jaxdpo.models import TransformerConfig
from jaxdpo.types import InputError

__all__ = [
    "FAMILIES",
    "Family",
    "Tensors",
    "Weight",
    "export_config",
    "export_tensors",
    "find_family",
    "load_params",
    "split_shards",
    "table_shapes",
]

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "gpt2": GPT2,
}
"""Hugging Face `model_type` -> its family."""


def find_family(hf_config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`; InputError, listing those supported, where there is none.

    Args:
      hf_config: contents of the file.
      where: what to call it in the message.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type {model_type!r} (architectures {hf_config.get('architectures')}) is not supported; "
            f"allowed: {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def export_config(config: TransformerConfig) -> dict[str, Any]:
    """Contents of `config.json`; InputError where its `model_type` cannot express the configuration."""
    if config.model_type not in FAMILIES:
        raise InputError(f"model_type is {config.model_type!r}; allowed: {', '.join(FAMILIES)}")
    family = FAMILIES[config.model_type]
    hf = {
        "architectures": [family.architectures[config.head]],
        "model_type": config.model_type,
        **family.to_hf(config),
        **hf_labels(config.head),
    }
    read = family.from_hf(hf)
    for field in dataclasses.fields(config):
        stated, back = getattr(config, field.name), getattr(read, field.name)
        if stated != back:
            raise InputError(
                f"a {config.model_type} config.json cannot say {field.name} = {stated!r}, "
                f"it would be read as {back!r}; use another model_type"
            )
    return hf
