"""From a directory in Hugging Face form to a sequence classifier and its parameters."""

import contextlib
import os
import pathlib
from typing import Any

import jax

from jaxdpo import families
from jaxdpo.hf.files import Safetensors
from jaxdpo.hf.load import hf_config, read_as
from jaxdpo.models.encoder import Encoder, make_encoder


def load_encoder(
    directory: str | os.PathLike[str], *, compute_dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> tuple[Encoder, dict[str, Any]]:
    """An encoder that classifies texts, from tokens to logits; `load_classifier` takes texts.

    Args:
      directory: `config.json` with `model.safetensors`, or with shards and their index, of a family in
        `families.CLASSIFIERS`.
      compute_dtype: as in `models.make_decoder`.
      mesh: from `sharding.make_mesh`; None for one device.
    Returns:
      encoder, and its parameters as a nested dict of float32 arrays.
    Raises:
      InputError: for an unsupported architecture, a missing or damaged file, or a tensor that does not fit.
    """
    config, where = hf_config(directory), f"config.json of {directory}"
    family = families.find_classifier(config, where)
    encoder = make_encoder(read_as(family.from_hf, config, where), compute_dtype=compute_dtype)
    with contextlib.ExitStack() as files:
        tensors = Safetensors(pathlib.Path(directory), files)
        return encoder, families.fill_params(family, encoder.config, encoder.abstract_params(mesh), tensors)
