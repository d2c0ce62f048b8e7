"""What the processes of a run settle before it starts: they were started alike, and write to one directory."""

import dataclasses
import hashlib
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from jaxdpo import processes
from jaxdpo.config import RunConfig
from jaxdpo.options import flag
from jaxdpo.train.run_dir import RunDir, claim, stated
from jaxdpo.types import InputError

WEIGHTS = ("config.json", "*.safetensors", "*.gguf")
"""Files of a model that are compared."""
BLOCKS, BLOCK = 64, 4096
"""So many blocks of each file, of so many bytes: reading all of a large model on every host would take minutes."""

Config = TypeVar("Config", bound=RunConfig)


def agree_on_options(config: Any) -> None:
    """InputError, naming them, for options or versions that differ between processes."""
    if processes.several():
        versions = {f"version of {name}": importlib.metadata.version(name) for name in ("jaxdpo", "jax", "flax")}
        processes.agree({flag(name): value for name, value in stated(config).items()} | versions)


def agree_on_inputs(source: Path, data: Mapping[str, str]) -> None:
    """InputError, naming it, if a model or data are not the same files' contents on all processes.

    Args:
      source: the model's directory.
      data: by what it is called, a digest of data and the tokens made of it.
    """
    if processes.several():
        processes.agree({"the model": model_digest(source), **data})


def model_digest(source: Path) -> str:
    """Of the names and sizes of a model's files, and of blocks spread over them."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for pattern in WEIGHTS for path in source.glob(pattern)):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for start in range(0, size, max(BLOCK, size // BLOCKS)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def claim_together(config: Config) -> Config:
    """`claim`, by process 0 for all."""
    agree_on_options(config)
    with processes.together():
        claimed = claim(config) if processes.is_main() else config
    return dataclasses.replace(config, **processes.of_main(stated(claimed)))


def create_together(run: RunDir) -> None:
    """Makes the directory of a run, by process 0; InputError unless all processes see it."""
    with processes.together():
        if processes.is_main():
            run.create()
    others = [number for number, first in enumerate(processes.gathered(processes.first_sharing(run.root))) if first]
    if others:
        raise InputError(
            f"--output-dir {run.root} is another directory on process {', '.join(map(str, others))} than on process 0; "
            "allowed: one on a file system that all of them share; name another"
        )
