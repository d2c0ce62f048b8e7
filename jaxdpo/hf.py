"""Hugging Face checkpoints in and out: safetensors, `config.json`, generation config, tokenizer and chat template.

The only file that touches safetensors. Nothing here unpickles, runs code from a checkpoint, or needs torch.
"""

import contextlib
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxdpo import families
from jaxdpo.families.fields import hf_token_ids
from jaxdpo.gguf import find_gguf
from jaxdpo.models import Decoder, TransformerConfig, make_decoder
from jaxdpo.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORED_DTYPES = ("F32", "BF16", "F16", "F64")
EXPORT_DTYPES = ("float32", "bfloat16", "float16")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_hf(
    directory: str | os.PathLike[str], *, compute_dtype: str = "float32", mesh: jax.sharding.Mesh | None = None
) -> tuple[Decoder, dict[str, Any]]:
    """A model from a directory in Hugging Face form, or one that holds a GGUF file.

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
    decoder = make_decoder(load_config(directory := pathlib.Path(directory)), compute_dtype=compute_dtype)
    with contextlib.ExitStack() as files:
        tensors: families.Tensors = find_gguf(directory) or _Safetensors(directory, files)
        return decoder, families.load_params(families.FAMILIES[decoder.config.model_type], decoder, tensors, mesh)


def load_config(directory: str | os.PathLike[str]) -> TransformerConfig:
    """What the model in a directory is, without its weights; InputError as `load_hf`."""
    config = hf_config(directory)
    family = families.find_family(config, f"config.json of {directory}")
    try:
        return family.from_hf(config)
    except (InputError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"config.json of {directory}: {error}") from error


def hf_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Contents of a directory's `config.json`, or what it would be for its GGUF file; InputError without either."""
    directory = pathlib.Path(directory)
    if file := find_gguf(directory):
        return file.config
    if not (directory / "config.json").is_file():
        found = sorted(path.name for path in directory.iterdir())[:8] if directory.is_dir() else "no directory"
        raise InputError(
            f"{directory} has no config.json (found: {found or 'nothing'}); "
            f"allowed: a directory written by save_pretrained or save_hf, or one with a .gguf file"
        )
    return _read_json(directory / "config.json")


def hf_generation_config(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Contents of a model directory's `generation_config.json`; None where there is none."""
    path = pathlib.Path(directory) / "generation_config.json"
    return _read_json(path) if path.is_file() else None


def load_tokenizer(directory: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model directory, or the one inside its GGUF file; InputError where there is none."""
    directory = pathlib.Path(directory)
    if file := find_gguf(directory):
        return file.tokenizer()
    from transformers import AutoTokenizer  # 2 s to import, and loading weights does not need it

    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
        raise InputError(
            f"{directory} has no tokenizer that transformers can load ({error}); "
            f"copy tokenizer.json and tokenizer_config.json of the model there"
        ) from error


def save_hf(
    directory: str | os.PathLike[str],
    decoder: Decoder,
    params: dict[str, Any],
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 2**30,
    overwrite: bool = False,
) -> pathlib.Path:
    """Writes a model as a Hugging Face directory that transformers, vLLM and `load_hf` read.

    Everything is written to a sibling directory that is renamed at the end: an export that was killed leaves no
    directory that looks whole.

    Args:
      directory: where; must not exist or be empty unless `overwrite`.
      decoder: the model.
      params: its parameters.
      tokenizer: saved beside it with its chat template; supplies token ids that the model's configuration lacks.
      generation_config: contents of `generation_config.json`; by default the special token ids.
      dtype: of the stored weights: "float32", "bfloat16" or "float16".
      max_shard_bytes: larger checkpoints are split into files of at most this size, with an index.
      overwrite: replace an existing directory.
    Returns:
      the directory.
    Raises:
      InputError: if the directory is in use, or for another dtype.
    """
    directory = pathlib.Path(directory).absolute()
    if dtype not in EXPORT_DTYPES:
        raise InputError(f"dtype of the export is {dtype!r}; allowed: {', '.join(EXPORT_DTYPES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
        raise InputError(f"{directory} exists and is not empty; name another directory, or pass overwrite=True")
    dtypes = {"dtype": dtype, "torch_dtype": dtype}  # the second is its name before transformers 5
    config = _tokenizer_ids(tokenizer) | families.export_config(decoder.config) | dtypes
    if generation_config is None:
        generation_config = _tokenizer_ids(tokenizer) | hf_token_ids(decoder.config)

    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / "config.json", config)
    _write_json(partial / "generation_config.json", dict(generation_config))
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    _write_weights(partial, decoder, params, jnp.dtype(dtype), max_shard_bytes)
    _move_into_place(partial, directory)
    return directory


class _Safetensors:
    """The tensors of one file, or of shards with an index; a `families.Tensors`."""

    def __init__(self, directory: pathlib.Path, files: contextlib.ExitStack):
        self.where = str(directory)
        self._slices: dict[str, Any] = {}
        if (directory / _INDEX).is_file():
            self._open_shards(directory, files)
        elif (directory / _WEIGHTS).is_file():
            self._open(directory / _WEIGHTS, files)
        elif any(directory.glob("pytorch_model*.bin")):
            raise InputError(
                f"{directory} holds only pickled weights (pytorch_model*.bin), which can run code and are never read; "
                f"convert them to safetensors: save_pretrained(...)"
            )
        else:
            raise InputError(f"{directory} has no weights; allowed: {_WEIGHTS}, or shards with {_INDEX}")
        self.shapes: Mapping[str, tuple[int, ...]] = {n: tuple(cut.get_shape()) for n, cut in self._slices.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A block of a tensor, in the dtype it is stored in."""
        if (stored := self._slices[name].get_dtype()) not in STORED_DTYPES:
            raise InputError(
                f"{self.where}: tensor {name!r} is stored as {stored}; allowed: {', '.join(STORED_DTYPES)}"
            )
        return self._slices[name][index]

    def _open(self, path: pathlib.Path, files: contextlib.ExitStack) -> None:
        try:
            file = files.enter_context(safetensors.safe_open(path, framework="numpy"))
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or damaged ({error}); download it again") from error
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if name in self._slices:
                raise InputError(f"{path}: tensor {name!r} is there twice, also in another shard; remove one")
            self._slices[name] = file.get_slice(name)

    def _open_shards(self, directory: pathlib.Path, files: contextlib.ExitStack) -> None:
        index = directory / _INDEX
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
            raise InputError(f"{index} has no weight_map from tensors to files; download it again")
        shards = sorted(set(listed.values()))
        if extra := sorted({path.name for path in directory.glob("model-*-of-*.safetensors")} - set(shards)):
            raise InputError(f"{index}: shard {extra[0]} is missing from the index; download the index again")
        for shard in shards:
            if pathlib.PurePath(shard).name != shard or not (directory / shard).is_file():
                raise InputError(
                    f"{index} lists the shard {shard!r}, which is not there; download the checkpoint again"
                )
            self._open(directory / shard, files)
        if absent := sorted(set(listed) - set(self._slices)):
            raise InputError(f"{index} lists the tensor {absent[0]!r}, which {listed[absent[0]]} does not hold")


def _write_weights(
    directory: pathlib.Path, decoder: Decoder, params: dict[str, Any], dtype: np.dtype, limit: int
) -> None:
    """One file, or shards of at most `limit` bytes and an index; at most one shard is in host memory."""
    family = families.FAMILIES[decoder.config.model_type]
    shapes = families.table_shapes(family, decoder.config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = families.split_shards(sizes, limit)
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else [_WEIGHTS]
    tensors = families.export_tensors(family, decoder, params)
    for file, names in zip(files, shards, strict=True):
        # Contiguous: safetensors writes the memory of a strided array as it lies, silently wrong.
        shard = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in itertools.islice(tensors, len(names))}
        save_file(shard, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file)  # safetensors lets only the owner read
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(directory / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def _move_into_place(partial: pathlib.Path, directory: pathlib.Path) -> None:
    """Renames; what was there is moved aside first and removed last."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _tokenizer_ids(tokenizer: Any) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: value for name in names if (value := getattr(tokenizer, name, None)) is not None}


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}; allowed: a JSON object")
    return value


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
