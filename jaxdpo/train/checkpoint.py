"""Orbax checkpoints that survive a kill at any moment and say so when a disk has changed them.

A checkpoint is `STEP/params`, `STEP/opt_state`, whatever else the state holds, and `STEP/meta` (step, configuration,
model, digests). Orbax commits a step by renaming it, so a save that was cut short is never the latest. It does not
notice a flipped byte, so `meta` holds a CRC-32 of every array, verified when it is read back.
"""

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdpo.train.state import TrainState
from jaxdpo.types import InputError

# Orbax warns, at every save, that what one process wrote needs no merging.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())

KEPT = 2
"""Checkpoints kept: the latest, and the one before it in case the latest is damaged."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, meta: Mapping[str, Any]) -> None:
        """Opens `directory`, creating it and clearing away saves that were cut short; `meta` goes with each save."""
        self.meta = meta
        keep = ocp.training.preservation_policies.LatestN(KEPT)
        self.directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(), preservation_policy=keep, cleanup_tmp_directories=True
        )
        self._pending: ocp.AsyncResponse | None = None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else int(latest.step)

    def save(self, state: TrainState) -> None:
        """Starts to write the state in the background; returns once it is copied, so the state may be donated."""
        self.wait()
        trees = _trees(state)
        digests = {name: tree_digests(tree) for name, tree in trees.items()}
        step = int(state.step)
        meta = _sealed(json.dumps({**self.meta, "step": step, "digests": digests}))
        self._pending = self._checkpointer.save_checkpointables_async(step, {**trees, "meta": meta})

    def wait(self) -> None:
        """Blocks until the last save is complete on disk; raises what went wrong with it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def restore(self, like: TrainState) -> TrainState:
        """The latest state, on the shardings of `like`: a state, or `jax.ShapeDtypeStruct`s in its place.

        Raises:
          InputError: if an array on disk is not the one that was saved.
        """
        path = self.directory / str(self.latest_step)
        meta = read_meta(path)
        trees = _load(path, _trees(like), meta)
        return like._replace(step=jax.device_put(np.int32(meta["step"]), like.step.sharding), **trees)

    def close(self) -> None:
        """Waits for the last save and releases the directory."""
        self.wait()
        self._checkpointer.close()


def find_checkpoint(path: Path) -> Path:
    """One step's directory: `path` itself, or the latest in it or in its `checkpoints/`; InputError without any."""
    if (path / "meta").is_dir():
        return path
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints"
    steps = [p for p in path.glob("*") if p.name.isdigit() and (p / "meta").is_dir()] if path.is_dir() else []
    if not steps:
        raise InputError(
            f"{path} holds no checkpoint; allowed: the --output-dir of a run, its checkpoints, or one of them; "
            "fix: give the directory that `jaxdpo dpo` wrote"
        )
    return max(steps, key=lambda p: int(p.name))


def read_meta(path: Path) -> dict[str, Any]:
    """The `meta` of one step's directory: `step`, `digests` and what `Checkpoints` was given."""
    sealed = _read(path, {"meta": None})["meta"]
    if sealed != _sealed(sealed["json"]):
        raise _damaged(path, "meta is not what was saved")
    return json.loads(sealed["json"])


def load_params(path: Path, abstract_params: dict) -> dict:
    """The parameters of one step's directory, verified, on the shardings of `abstract_params`."""
    return _load(path, {"params": abstract_params}, read_meta(path))["params"]


def tree_digests(tree: Any) -> dict[str, int]:
    """CRC-32 of every array of a pytree (4 GB/s), keyed by its path, dtype and shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(path, leaf): _crc32(leaf) for path, leaf in leaves}


def _trees(state: TrainState) -> dict[str, Any]:
    """What is saved of a state besides its step, by field: `params`, `opt_state`, and what is not None."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}


def _name(path: jax.tree_util.KeyPath, leaf: Any) -> str:
    return f"{jax.tree_util.keystr(path)} {leaf.dtype}{list(leaf.shape)}"


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _crc32(array: Any) -> int:
    host = np.ascontiguousarray(jax.device_get(array))
    return zlib.crc32(host.reshape(-1).view(np.uint8).data)


def _sealed(text: str) -> dict[str, str]:
    """One text and its digest; Orbax would take an empty dict or list in a tree for no leaf at all."""
    return {"json": text, "crc32": f"{zlib.crc32(text.encode()):08x}"}


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: {what}: the disk changed it; fix: remove {path} to go on from the checkpoint before it")


def _read(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """What Orbax reads; its own errors say no more than "incompatible handler"."""
    try:
        return ocp.load_checkpointables(path.absolute(), like)
    except (LookupError, ValueError, OSError) as error:
        raise _damaged(path, f"{', '.join(like)} cannot be read ({type(error).__name__})") from error


def _load(path: Path, like: dict[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    for name, tree in like.items():
        keys = {_name(key, leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        stored = set(meta["digests"][name])
        if keys != stored:
            raise InputError(
                f"{path}: {name} holds other arrays than this model and optimizer: "
                f"{sorted(stored ^ keys)[:4]}; fix: resume with the options the run was started with"
            )
    trees = _read(path, jax.tree.map(_abstract, like))
    for name, tree in trees.items():
        if name not in like:
            continue
        for key, digest in tree_digests(tree).items():
            if digest != meta["digests"][name][key]:
                saved = meta["digests"][name][key]
                raise _damaged(path, f"{name}{key} is not what was saved (CRC-32 {digest:08x}, saved {saved:08x})")
    return trees
