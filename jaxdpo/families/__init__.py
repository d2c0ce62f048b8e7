"""Model families: how checkpoints of each Hugging Face `model_type` are read and written. A family is a line here.

Language models and reward models are in `FAMILIES`; encoders that classify texts, which are only read, in
`CLASSIFIERS`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxdpo.families.fields import hf_labels
from jaxdpo.families.gpt2 import GPT2
from jaxdpo.families.llama import LLAMA, MISTRAL
from jaxdpo.families.roberta import ROBERTA
from jaxdpo.families.table import EncoderFamily, Family, Weight
from jaxdpo.families.transfer import Tensors, export_tensors, fill_params, load_params, split_shards, table_shapes
from jaxdpo.models import TransformerConfig
from jaxdpo.types import InputError

__all__ = [
    "CLASSIFIERS",
    "FAMILIES",
    "EncoderFamily",
    "Family",
    "Tensors",
    "Weight",
    "export_config",
    "export_tensors",
    "fill_params",
    "find_classifier",
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

CLASSIFIERS: dict[str, EncoderFamily] = {
    "roberta": ROBERTA,
}
"""Hugging Face `model_type` -> how its sequence classifiers are read."""

_Family = TypeVar("_Family")


def find_family(hf_config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`; InputError, listing those supported, where there is none.

    Args:
      hf_config: contents of the file.
      where: what to call it in the message.
    """
    return _find(FAMILIES, hf_config, where)


def find_classifier(hf_config: Mapping[str, Any], where: str) -> EncoderFamily:
    """As `find_family`, of a sequence classifier in `CLASSIFIERS`."""
    return _find(CLASSIFIERS, hf_config, where)


def _find(table: Mapping[str, _Family], hf_config: Mapping[str, Any], where: str) -> _Family:
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in table:
        raise InputError(
            f"{where}: model_type {model_type!r} (architectures {hf_config.get('architectures')}) is not supported; "
            f"allowed: {', '.join(table)}"
        )
    return table[model_type]


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
