"""The fields of a record: each function returns what a field holds, or raises `InputError` that says what it must hold.

An item of a list is named like a field of its own: `'completions[1]'`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxdpo.types import InputError

Record = Mapping[str, Any]

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def text(record: Record, field: str, *, may_be_empty: bool = False) -> str:
    """The string in a field."""
    allowed = _allowed_text(may_be_empty)
    return _checked_text(field, _value(record, field, allowed), allowed, may_be_empty)


def texts(record: Record, field: str, *, at_least: int) -> tuple[str, ...]:
    """The strings in a field, none of them empty."""
    allowed = f"a list of {at_least} strings or more"
    values = _list(record, field, allowed)
    if len(values) < at_least:
        raise InputError(f"field {field!r} has {len(values)} entries; allowed: {allowed}; add to it or delete the line")
    return tuple(_checked_text(f"{field}[{i}]", value, _allowed_text(), False) for i, value in enumerate(values))


def boolean(record: Record, field: str) -> bool:
    """The truth value in a field; 0 and 1 are none, they could as well be ranks."""
    value = _value(record, field, "true or false")
    if not isinstance(value, bool):
        raise InputError(f"field {field!r} is {_shown(value)}; allowed: true or false; write one of them")
    return value


def ranks(record: Record, field: str, count: int) -> list[int | None]:
    """A whole number or None for each of `count` completions."""
    return _for_each(record, field, count, _is_rank, "a whole number, lower is better, or null: not ranked")


def scores(record: Record, field: str, count: int) -> list[float]:
    """A finite number for each of `count` completions."""
    return _for_each(record, field, count, _is_score, "a finite number, higher is better")


def _for_each(record: Record, field: str, count: int, holds: Callable[[Any], bool], allowed: str) -> list:
    values = _list(record, field, f"a list of {count} numbers, one for each completion")
    if len(values) != count:
        raise InputError(
            f"field {field!r} has {len(values)} entries for {count} completions; allowed: one for each; "
            "correct the line"
        )
    for i, value in enumerate(values):
        if not holds(value):
            raise InputError(f"field '{field}[{i}]' is {_shown(value)}; allowed: {allowed}; correct the line")
    return values


def _is_rank(value: Any) -> bool:
    return value is None or _is_number(value, int)


def _is_score(value: Any) -> bool:
    return _is_number(value, int) or (_is_number(value, float) and math.isfinite(value))


def _is_number(value: Any, kinds: Any) -> bool:
    """Whether it is of these kinds; a bool is an int to Python, and none to JSON."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _value(record: Record, field: str, allowed: str) -> Any:
    if field not in record:
        raise InputError(f"field {field!r} is missing; got the fields {sorted(record)}; allowed: {allowed}; add it")
    return record[field]


def _list(record: Record, field: str, allowed: str) -> list:
    value = _value(record, field, allowed)
    if not isinstance(value, list):
        raise InputError(f"field {field!r} is {_shown(value)}; allowed: {allowed}; write it as a JSON list")
    return value


def _allowed_text(may_be_empty: bool = False) -> str:
    return "a string" if may_be_empty else "a string that is not empty"


def _checked_text(name: str, value: Any, allowed: str, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"field {name!r} is {_KINDS.get(type(value), type(value).__name__)}; allowed: {allowed}; write it as text, "
            "messages as the model's chat template renders them (tokenizer.apply_chat_template)"
        )
    if not value and not may_be_empty:
        raise InputError(f"field {name!r} is ''; allowed: {allowed}; fill it or delete the line")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise InputError(
            f"field {name!r} holds {value[error.start]!a}, half of a surrogate pair, at character {error.start}; "
            "allowed: text that can be written as UTF-8; delete the character"
        ) from None
    return value


def _shown(value: Any) -> str:
    """A number as it stands, anything else by its kind, because it can be long."""
    return str(value) if _is_number(value, int | float) else _KINDS.get(type(value), type(value).__name__)
