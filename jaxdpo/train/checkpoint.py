"""Orbax checkpoints that survive a kill at any moment, and say so when a disk is full or has changed them.

A checkpoint is `STEP/params`, `STEP/opt_state`, whatever else the state holds, and `STEP/meta` (step, configuration,
model, digests). Orbax commits a step by renaming it, so a save that was cut short is never the latest. It does not
notice a flipped byte, so `meta` holds a digest of every array, verified when it is read back. Several processes write
and read one checkpoint together, each its devices' parts; it may be read by another number of them.
"""

import contextlib
import json
import logging
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from jaxdpo.disk import writing
from jaxdpo.processes import of_main
from jaxdpo.sharding import place
from jaxdpo.train.digests import array_name, tree_digests
from jaxdpo.train.state import PPOState, TrainState
from jaxdpo.types import InputError

# Orbax warns, at every save, that what one process wrote needs no merging; of a save that fails each of its threads
# logs the traceback of the error that `Checkpoints` raises.
_SAID_ELSEWHERE = re.compile(
    r"Skipping merge of OCDBT|run\(\) raised an exception|Failed to run .* save thread|Save Finalize"
)
logging.getLogger("absl").addFilter(lambda record: not _SAID_ELSEWHERE.search(record.getMessage()))

State = TypeVar("State", TrainState, PPOState)

KEPT = 2
"""Checkpoints kept besides the best: the latest, and the one before it in case the latest is damaged."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, meta: Mapping[str, Any], *, keep_best: str | None = None) -> None:
        """Opens `directory`, creating it and clearing away saves that were cut short.

        Args:
          directory: where the run keeps them.
          meta: goes with each save.
          keep_best: a metric; the checkpoint where it is highest is kept besides the latest; of equals the one with the
            lowest `eval_loss`, of these the first.
        Raises:
          RunStopped: if the disk is full or read-only.
        """
        self.meta = meta
        self.directory = directory
        self._keep_best = keep_best
        policies = ocp.training.preservation_policies
        best = policies.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False)
        keep = policies.AnyPreservationPolicy([policies.LatestN(KEPT), *([best] if keep_best else [])])
        self._pending: ocp.AsyncResponse | None = None
        self._failed = False
        with writing(directory):
            try:
                self._checkpointer = ocp.training.Checkpointer(
                    directory.absolute(), preservation_policy=keep, cleanup_tmp_directories=True
                )
            except ValueError as error:  # of `STEP/metrics`, all that Orbax reads here
                raise InputError(
                    f"{directory}: the metrics of a checkpoint cannot be read ({error}): the disk changed them; fix: "
                    "remove that checkpoint"
                ) from error

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none: as process 0 sees it, whom all have to ask."""
        latest = self._checkpointer.latest
        return of_main(None if latest is None else int(latest.step))

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint where the metric is highest, None if none was saved with it; see `latest_step`."""
        scored = [checkpoint for checkpoint in self._checkpointer.checkpoints if checkpoint.metrics is not None]
        best = max(scored, key=lambda checkpoint: _rank(checkpoint.metrics), default=None)
        return of_main(None if best is None else int(best.step))

    def save(self, state: TrainState | PPOState, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to write the state in the background; returns once it is copied, so the state may be donated.

        Args:
          state: what is saved.
          metrics: of the state on held-out data, where it was evaluated; `keep_best` is one of them.
        Raises:
          RunStopped: if the disk is full or read-only, now or at the last save.
        """
        self.wait()
        trees = _trees(state)
        digests = {name: tree_digests(tree) for name, tree in trees.items()}
        step = int(state.step)
        meta = _sealed(json.dumps({**self.meta, "step": step, "digests": digests}))
        score = None if metrics is None or self._keep_best is None else self._score(metrics, step)
        with self._saving():
            # Where Orbax cannot make a directory, its threads wait for each other first and complain at exit.
            os.rmdir(tempfile.mkdtemp(dir=self.directory, suffix=".orbax-checkpoint-tmp"))
            self._pending = self._checkpointer.save_checkpointables_async(step, {**trees, "meta": meta}, metrics=score)

    def wait(self) -> None:
        """Blocks until the last save is complete on disk.

        Raises:
          RunStopped: if the disk was full or read-only; the checkpoints before it are whole.
        """
        if self._pending is not None:
            with self._saving():
                self._pending.result()
            self._pending = None

    def restore(self, like: State) -> State:
        """The latest state, on the shardings of `like`: a state, or `jax.ShapeDtypeStruct`s in its place.

        Raises:
          InputError: if an array on disk is not the one that was saved.
        """
        path = self.directory / str(self.latest_step)
        meta = read_meta(path)
        trees = _load(path, _trees(like), meta)
        return like._replace(step=place(np.int32(meta["step"]), like.step.sharding), **trees)

    def close(self) -> None:
        """Waits for the last save and releases the directory; raises what went wrong unless that was raised before."""
        try:
            self.wait()
        finally:
            # Orbax raises the error of a failed save again here.
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._checkpointer.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """RunStopped for a disk that takes no more, naming the last checkpoint; nothing is saved after an error."""
        committed = [int(path.name) for path in self.directory.glob("*") if path.name.isdigit()]
        left = f"{self.directory / str(max(committed))} is whole" if committed else "no checkpoint was saved before"
        try:
            with writing(self.directory, left=left):
                yield
        except Exception:
            self._failed, self._pending = True, None
            raise

    def _score(self, metrics: Mapping[str, float], step: int) -> dict[str, float]:
        """What Orbax keeps of a checkpoint's metrics."""
        assert self._keep_best is not None
        if self._keep_best not in metrics:
            raise InputError(
                f"the best checkpoint cannot be kept by {self._keep_best!r}: an evaluation has {', '.join(metrics)}; "
                "fix: name one of these"
            )
        value = float(metrics[self._keep_best])
        loss = float(metrics.get("eval_loss", 0.0))
        return {"value": -math.inf if math.isnan(value) else value, "loss": loss, "step": step}


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


def _rank(score: Mapping[str, float]) -> tuple[float, float, float]:
    """By value; of equal ones the lower loss is the better, then the earlier step."""
    return score["value"], -score["loss"], -score["step"]


def _trees(state: TrainState | PPOState) -> dict[str, Any]:
    """What is saved of a state besides its step, by field: `params`, `opt_state`, and what is not None."""
    return {name: tree for name, tree in state._asdict().items() if name != "step" and tree is not None}


def abstract(tree: Any) -> Any:
    """Shape, dtype and sharding of every array of a pytree: what `restore` and `load_params` need once it is gone."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


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
        keys = {array_name(key, leaf) for key, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        stored = set(meta["digests"][name])
        if keys != stored:
            raise InputError(
                f"{path}: {name} holds other arrays than this model and optimizer: "
                f"{sorted(stored ^ keys)[:4]}; fix: resume with the options the run was started with"
            )
    trees = _read(path, abstract(like))
    for name, tree in trees.items():
        if name not in like:
            continue
        for key, digest in tree_digests(tree).items():
            if digest != meta["digests"][name][key]:
                saved = meta["digests"][name][key]
                raise _damaged(path, f"{name}{key} is not what was saved (digest {digest}, saved {saved})")
    return trees
