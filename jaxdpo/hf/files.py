"""The files of a Hugging Face directory: safetensors, single or in shards with an index, and JSON.

The only file that touches safetensors. Nothing here unpickles.
"""

import collections
import contextlib
import itertools
import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from jaxdpo import families
from jaxdpo.disk import LFS_POINTER
from jaxdpo.models import Decoder
from jaxdpo.types import InputError

STORED_DTYPES = ("F32", "BF16", "F16", "F64")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Safetensors:
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
            check_no_adapter(directory)
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
            with contextlib.suppress(OSError), path.open("rb") as start:
                if start.read(len(LFS_POINTER)) == LFS_POINTER:
                    raise InputError(
                        f"{path} is a Git LFS pointer, not the weights; fetch them: git lfs pull"
                    ) from None
            raise InputError(f"{path} is truncated or damaged ({error}); download it again") from error
        for name in file.keys():  # noqa: SIM118, it is no mapping
            if name in self._slices:
                raise InputError(f"{path}: tensor {name!r} is there twice, also in another shard; remove one")
            self._slices[name] = file.get_slice(name)

    def _open_shards(self, directory: pathlib.Path, files: contextlib.ExitStack) -> None:
        index = directory / _INDEX
        listed = read_json(index).get("weight_map")
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


def write_weights(
    directory: pathlib.Path | None, decoder: Decoder, params: dict[str, Any], dtype: np.dtype, limit: int
) -> None:
    """One file, or shards of at most `limit` bytes and an index; at most one shard is in host memory.

    None for a directory: another process writes, and this one gives it the parts of the parameters that it holds.
    """
    family = families.FAMILIES[decoder.config.model_type]
    shapes = families.table_shapes(family, decoder.config)
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards = families.split_shards(sizes, limit)
    numbered = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    files = numbered if len(shards) > 1 else [_WEIGHTS]
    tensors = families.export_tensors(family, decoder, params)
    if directory is None:
        collections.deque(tensors, maxlen=0)
        return
    for file, names in zip(files, shards, strict=True):
        # Contiguous: safetensors writes the memory of a strided array as it lies, silently wrong.
        shard = {name: np.ascontiguousarray(tensor, dtype) for name, tensor in itertools.islice(tensors, len(names))}
        save_file(shard, directory / file, metadata={"format": "pt"})
        shutil.copymode(directory / "config.json", directory / file)  # safetensors lets only the owner read
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(directory / _INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})


def move_into_place(partial: pathlib.Path, directory: pathlib.Path) -> None:
    """Renames; what was there is moved aside first and removed last."""
    replaced = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    partial.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def check_no_adapter(directory: pathlib.Path) -> None:
    """InputError for a directory that holds what PEFT adds to a model, and no model."""
    if (directory / "adapter_config.json").is_file():
        raise InputError(
            f"{directory} is an adapter (adapter_config.json), which is no model alone; allowed: whole models; merge "
            "it into its base model: PEFT's merge_and_unload(), then save_pretrained(...)"
        )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The object in a file; InputError where it holds none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}; allowed: a JSON object")
    return value


def write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
    """Writes an object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
