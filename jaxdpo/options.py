"""How an option is declared, checked and read: the same for a flag of the command line and a key of a YAML file."""

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from jaxdpo.types import InputError


def option(help: str, group: str, default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field with the help text and the group that `--help` shows."""
    return dataclasses.field(default=default, metadata={"help": help, "group": group})


Ranges = Mapping[str, tuple[str, Callable[[Any], bool]]]
"""Field -> what it allows, in words and as a test."""


def check_fields(config: Any, ranges: Ranges, paths: Collection[str]) -> None:
    """Checks type and range of every field of a frozen dataclass, and expands `~` in paths, also in lists with commas.

    Raises:
      InputError: names the flag, the value and what is allowed.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = _typed(getattr(config, field.name), hints[field.name], flag(field.name))
        if field.name in paths and value is not None:
            value = ",".join(map(os.path.expanduser, value.split(",")))  # YAML files have no shell to do it
        object.__setattr__(config, field.name, value)
        if field.name in ranges and value is not None:
            allowed, holds = ranges[field.name]
            if not holds(value):
                raise InputError(f"{flag(field.name)} is {value!r}; allowed: {allowed}")


def flag(name: str) -> str:
    """The command-line flag of a field: `max_steps` -> `--max-steps`."""
    return "--" + name.replace("_", "-")


def from_mapping(cls: type, mapping: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Checked keyword arguments for `cls` from a mapping, e.g. a YAML file; keys with hyphens mean underscores.

    Args:
      cls: a configuration class of `jaxdpo.config`.
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
