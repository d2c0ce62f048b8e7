"""How an option is declared, checked and read: the same for a flag of the command line and a key of a YAML file."""

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from jaxdpo.types import InputError


def option(help: str, group: str, default: Any = dataclasses.MISSING, *, alias: str | None = None) -> Any:
    """A dataclass field with the help text and the group that `--help` shows, and perhaps a short flag."""
    metadata = {"help": help, "group": group} | ({} if alias is None else {"alias": alias})
    return dataclasses.field(default=default, metadata=metadata)


LONGEST_NAME = 255
"""Bytes that a file system takes for the name of a file or directory."""

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
        switch = isinstance(value, bool)  # may have the name of another command's file
        if field.name in paths and value is not None and not switch:
            value = ",".join(map(os.path.expanduser, value.split(",")))  # YAML files have no shell to do it
            _check_path(flag(field.name), value)
        object.__setattr__(config, field.name, value)
        if field.name in ranges and value is not None and not switch:
            allowed, holds = ranges[field.name]
            if not holds(value):
                raise InputError(f"{flag(field.name)} is {value!r}; allowed: {allowed}")


def _check_path(where: str, value: str) -> None:
    """InputError for what no file system takes for a path, or for several with commas between."""
    for name in re.split("[,/]", value):
        if (size := len(name.encode(errors="replace"))) > LONGEST_NAME or "\0" in name:
            raise InputError(
                f"{where} has a name of {size} bytes, {name[:20]!r}; allowed: at most {LONGEST_NAME}, and no NUL "
                "character; correct the path"
            )


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
            raise InputError(
                f"{source}: unknown key {key!r}; did you mean {nearest(name, names)!r}? Allowed: {', '.join(names)}"
            )
        if name in values:
            raise InputError(f"{source}: key {key!r} is given twice; keep one")
        values[name] = _typed(value, hints[name], f"{source}: {key}")
    return values


def config_path(words: Sequence[str]) -> str | None:
    """The file that `--config` names among the words of a command; InputError if it is given twice."""
    given = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"]
    given += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    if len(given) > 1:
        raise InputError(f"--config is given {len(given)} times ({', '.join(given)}); allowed: once; merge the files")
    return os.path.expanduser(given[0]) if given else None


def nearest(name: str, names: Sequence[str], *, cutoff: float = 0.0) -> str:
    """The one of some names that was probably meant: by its initials, or else by its letters; empty below `cutoff`.

    Example:
      >>> nearest("lr", ["loss", "learning_rate"]), nearest("Bta", ["beta", "data"])
      ('learning_rate', 'beta')
    """
    initials = {"".join(part[0] for part in other.split("_")): other for other in names if "_" in other}
    return initials.get(name) or next(iter(difflib.get_close_matches(name.lower(), names, n=1, cutoff=cutoff)), "")


def check_words(cls: type, words: Sequence[str], command: str, *, others: Sequence[str] = ()) -> None:
    """Checks what follows a command before it is parsed; what is missing is left to the parser.

    Args:
      cls: the command's configuration class.
      words: flags and their values.
      command: what to call it in messages.
      others: flags that take a value and are no fields of `cls`.
    Raises:
      InputError: for a flag that the command lacks, a value of another type, or a stray word. Of a flag that is given
        twice the last one holds, as in other commands.
    """
    hints = {"--" + name.replace("_", "-"): hint for name, hint in typing.get_type_hints(cls).items()}
    short = {field.metadata.get("alias"): flag(field.name) for field in dataclasses.fields(cls)}
    hints |= dict.fromkeys(others, str)
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        name = short.get(name, name.replace("_", "-"))
        option = name.replace("--no-", "--") if hints.get(name.replace("--no-", "--")) is bool else name
        if not name.startswith("--") or (equals and hints.get(option) is bool):
            raise InputError(
                f"{word!r} belongs to no option of {command}; allowed: --option value; quote it, or drop it"
            )
        if option not in hints:
            names = [known[2:].replace("-", "_") for known in hints]
            near = nearest(name[2:].replace("-", "_"), names, cutoff=0.6)
            meant = f"did you mean {flag(near)}? " if near else ""
            raise InputError(f"{command} has no option {name}; {meant}{command} --help lists all")
        if hints[option] is not bool:
            _check_spelled(option, value if equals else next(rest, None), hints[option])


def _check_spelled(option: str, text: str | None, hint: Any) -> None:
    """InputError for a value of a flag that does not spell what is hinted; None stands for a missing value."""
    kind = typing.get_args(hint)[0] if _optional(hint) else hint
    if text is None or (_optional(hint) and text == "None"):
        return
    if typing.get_origin(kind) is Literal:
        _typed(text, kind, option)
    elif kind in (int, float):
        try:
            kind(text)
        except ValueError:
            raise InputError(f"{option} is {text!r}; allowed: {_TYPE_NAMES[kind]}") from None


def _optional(hint: Any) -> bool:
    return types.NoneType in typing.get_args(hint)


def _typed(value: Any, hint: Any, where: str) -> Any:
    """The value if it has the hinted type; a whole number where a float is meant becomes one."""
    if _optional(hint) and value is None:
        return None
    if _optional(hint):
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
