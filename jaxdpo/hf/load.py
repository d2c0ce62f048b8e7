"""From a directory in Hugging Face form, or one that holds a GGUF file, to a decoder and its parameters."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import numpy as np

from jaxdpo import families
from jaxdpo.gguf import find_gguf
from jaxdpo.hf.files import Safetensors, check_no_adapter, read_json
from jaxdpo.models import Decoder, TransformerConfig, abstract_params, make_decoder
from jaxdpo.sharding import place
from jaxdpo.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Read = TypeVar("Read")


def load_hf(
    directory: str | os.PathLike[str], *, compute_dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """A language model from a directory in Hugging Face form, or one that holds a GGUF file.

    Weights are read tensor by tensor, each device's part straight to it, and become float32 masters; bfloat16 and
    float16 weights convert exactly.

    Args:
      directory: `config.json` with `model.safetensors`, or with shards and their index; or one `*.gguf`. From
        `hub.resolve_model`.
      compute_dtype: as in `models.make_decoder`.
      mesh: from `sharding.make_mesh`; None for one device.
    Returns:
      decoder, and its parameters as a nested dict of float32 arrays.
    Raises:
      InputError: for an unsupported architecture, a missing or damaged file, or a tensor that does not fit.
    """
    decoder = make_decoder(load_config(directory), compute_dtype=compute_dtype)
    return decoder, _load_params(directory, decoder, mesh)


def load_reward_model(
    directory: str | os.PathLike[str],
    *,
    seed: int | None = None,
    compute_dtype: str = "float32",
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """A reward model: a decoder with a score head, from a sequence classifier or on top of a language model.

    A classifier (`...ForSequenceClassification` of one label) brings its head. On a language model the head is new,
    normal with the model's `init_std`, as transformers and TRL draw it: small, so that the first rewards are near 0.

    Args:
      directory: as for `load_hf`.
      seed: of a new head. None: a language model is refused, as its scores would be noise.
      compute_dtype: as in `models.make_decoder`.
      mesh: as for `load_hf`.
    Returns:
      decoder, and its parameters: those of a language model without its head, and `score`.
    Raises:
      InputError: as for `load_hf`, for more than one label, for a head with a bias, or for a language model without
        `seed`.
    """
    decoder = make_decoder(load_config(directory, head="score"), compute_dtype=compute_dtype)
    found = _read_config(directory)
    if found.head == "score":
        return decoder, _load_params(directory, decoder, mesh)
    if seed is None:
        raise InputError(
            f"config.json of {directory}: {_architecture(directory)} is a language model without a score head; "
            f"allowed: a sequence classifier of one label; fix: train one, jaxdpo reward --model {directory}"
        )
    # Tied: then no LM head is asked for, and one that is there is passed over.
    backbone = dataclasses.replace(decoder, config=dataclasses.replace(found, tie_embeddings=True))
    config, leaf = decoder.config, abstract_params(decoder, mesh)["score"]
    score = np.random.default_rng(seed).normal(scale=config.init_std, size=leaf.shape).astype(leaf.dtype)
    return decoder, {**_load_params(directory, backbone, mesh), "score": place(score, leaf.sharding)}


def load_config(directory: str | os.PathLike[str], *, head: str = "lm") -> TransformerConfig:
    """What the model in a directory is, without its weights.

    Args:
      directory: as for `load_hf`.
      head: "lm" for a language model; "score" for a reward model, which any directory gives.
    Raises:
      InputError: as `load_hf`, or if an LM head is wanted and the directory holds a classifier.
    """
    config = _read_config(directory)
    if config.head == head:
        return config
    if head == "lm":
        raise InputError(
            f"config.json of {directory}: {_architecture(directory)} is a reward model without an LM head; "
            f"allowed: a language model, such as {families.FAMILIES[config.model_type].architectures['lm']}"
        )
    # A language model's padding says nothing about where a score is read, and is often its EOS, which is to be read.
    return dataclasses.replace(config, head="score", pad_token_id=None)


def _read_config(directory: str | os.PathLike[str]) -> TransformerConfig:
    config, where = hf_config(directory), f"config.json of {directory}"
    return read_as(families.find_family(config, where).from_hf, config, where)


def read_as(from_hf: Callable[[dict[str, Any]], Read], config: dict[str, Any], where: str) -> Read:
    """What a family makes of a `config.json`; InputErrors say where it stands."""
    try:
        return from_hf(config)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"{where}: a value is of the wrong type ({error}); allowed: what transformers writes; download it again"
        ) from error


def _architecture(directory: str | os.PathLike[str]) -> str:
    config = hf_config(directory)
    return (config.get("architectures") or [config["model_type"]])[0]


def _load_params(directory: str | os.PathLike[str], decoder: Decoder, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    directory = pathlib.Path(directory)
    with contextlib.ExitStack() as files:
        tensors: families.Tensors = find_gguf(directory) or Safetensors(directory, files)
        if "score.bias" in tensors.shapes:
            raise InputError(
                f"{tensors.where}: tensor 'score.bias'; allowed: a head without bias, which moves every reward alike; "
                f"train one without, or remove the tensor and take its value off the rewards you compare with"
            )
        return families.load_params(families.FAMILIES[decoder.config.model_type], decoder, tensors, mesh)


def hf_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Contents of a directory's `config.json`, or what it would be for its GGUF file; InputError without either."""
    directory = pathlib.Path(directory)
    if file := find_gguf(directory):
        return file.config
    if not (directory / "config.json").is_file():
        check_no_adapter(directory)
        found = sorted(path.name for path in directory.iterdir())[:8] if directory.is_dir() else "no directory"
        raise InputError(
            f"{directory} has no config.json (found: {found or 'nothing'}); "
            f"allowed: a directory written by save_pretrained or save_hf, or one with a .gguf file"
        )
    return read_json(directory / "config.json")


def hf_generation_config(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Contents of a model directory's `generation_config.json`; None where there is none."""
    path = pathlib.Path(directory) / "generation_config.json"
    return read_json(path) if path.is_file() else None


def load_tokenizer(directory: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory, or the one inside its GGUF file; InputError where there is none."""
    directory = pathlib.Path(directory)
    if file := find_gguf(directory):
        return file.tokenizer()
    from transformers import AutoTokenizer  # 2 s to import, and loading weights does not need it

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        reason = " ".join(str(error).split())  # transformers writes lists over several lines
        raise InputError(
            f"{directory} has no tokenizer that transformers can load ({reason:.300}); "
            f"copy tokenizer.json and tokenizer_config.json of the model there"
        ) from error
