"""The fields of a record: each function returns what a field holds, or raises `InputError` that says what it must hold.

A null counts as absent, because readers of columns fill the fields that a record lacks with it. What stands inside a
field is named by its path: `'completions[1]'`, `'chosen[0].role'`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxdpo.types import InputError

Record = Mapping[str, Any]
LARGEST = 3.4028234663852886e38
"""What float32 holds."""

_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def present(record: Record) -> set[str]:
    """Names of the fields that hold something.

    Example:
      >>> sorted(present({"prompt": "", "completion": " 4", "label": None}))
      ['completion', 'prompt']
    """
    return {field for field, value in record.items() if value is not None}


def text(record: Record, field: str, *, may_be_empty: bool = False, within: str = "") -> str:
    """The string in a field; `within` is the path of the record if it stands inside another: `chosen[0].`."""
    allowed = _allowed_text(may_be_empty)
    return _checked_text(within + field, _value(record, field, allowed, within), allowed, may_be_empty)


def texts(record: Record, field: str) -> tuple[str, ...]:
    """Two strings or more, none of them empty."""
    values = several(record, field, "a list of 2 strings or more")
    return tuple(_checked_text(f"{field}[{i}]", value, _allowed_text(), False) for i, value in enumerate(values))


def several(record: Record, field: str, allowed: str) -> list:
    """The list in a field, of at least two entries."""
    values = listed(record, field, allowed)
    if len(values) < 2:
        raise InputError(f"field {field!r} has {len(values)} entries; allowed: {allowed}; add to it or delete the line")
    return values


def listed(record: Record, field: str, allowed: str) -> list:
    """The list in a field."""
    value = _value(record, field, allowed)
    if not isinstance(value, list):
        raise InputError(f"field {field!r} is {shown(value)}; allowed: {allowed}; write it as a JSON list")
    return value


def boolean(record: Record, field: str) -> bool:
    """The truth value in a field; 0 and 1 are none, they could as well be ranks."""
    value = _value(record, field, "true or false")
    if not isinstance(value, bool):
        raise InputError(f"field {field!r} is {shown(value)}; allowed: true or false; write one of them")
    return value


def optional_number(record: Record, field: str) -> float | None:
    """The finite number in a field; None where it is absent."""
    if (value := record.get(field)) is None:
        return None
    if not _is_score(value):
        raise InputError(
            f"field {field!r} is {shown(value)}; allowed: a finite number, or null: not stated; correct the line"
        )
    if abs(value) > LARGEST:
        got = f"a whole number of {len(str(abs(value)))} digits" if isinstance(value, int) else str(value)
        raise InputError(
            f"field {field!r} is {got}; allowed: a number from -{LARGEST:.2g} to {LARGEST:.2g}, as float32 holds it; "
            "correct the line"
        )
    return float(value)


def ranks(record: Record, field: str, count: int) -> list[int | None]:
    """A whole number or None for each of `count` completions."""
    return _for_each(record, field, count, _is_rank, "a whole number, lower is better, or null: not ranked")


def scores(record: Record, field: str, count: int) -> list[float]:
    """A finite number for each of `count` completions."""
    return _for_each(record, field, count, _is_score, "a finite number, higher is better")


def check_utf8(name: str, value: str) -> None:
    """Raises InputError where a string holds half of a surrogate pair: JSON can spell it, no tokenizer takes it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"field {name!r} holds {value[error.start]!a}, half of a surrogate pair, at character {error.start}; "
            "allowed: text that can be written as UTF-8; delete the character"
        ) from None


def check_message_keys(name: str, value: Any) -> None:
    """Raises InputError where a value is a message in the words of ShareGPT, or a list that begins with one.

    Example:
      >>> check_message_keys("chosen", [{"role": "assistant", "content": "4"}])
      >>> check_message_keys("chosen", {"from": "gpt", "value": "4"})  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      jaxdpo.types.InputError: field 'chosen' holds 'from' and 'value', as ShareGPT and LLaMA-Factory do; ...
    """
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, dict) and first.keys() >= {"from", "value"}:
        raise InputError(
            f"field {name!r} holds 'from' and 'value', as ShareGPT and LLaMA-Factory do; allowed: a list of messages, "
            '{"role": …, "content": …} each; rename "from" to "role" ("human" to "user", "gpt" to "assistant") and '
            '"value" to "content", write a single message as a list of one, and rename "conversations" to "prompt" '
            'beside "chosen" and "rejected", else to "messages"'
        )


def shown(value: Any) -> str:
    """A number as it stands, anything else by its kind, because it can be long."""
    return str(value) if _is_number(value, int | float) else _KINDS.get(type(value), type(value).__name__)


def _for_each(record: Record, field: str, count: int, holds: Callable[[Any], bool], allowed: str) -> list:
    values = listed(record, field, f"a list of {count} numbers, one for each completion")
    if len(values) != count:
        raise InputError(
            f"field {field!r} has {len(values)} entries for {count} completions; allowed: one for each; "
            "correct the line"
        )
    for i, value in enumerate(values):
        if not holds(value):
            raise InputError(f"field '{field}[{i}]' is {shown(value)}; allowed: {allowed}; correct the line")
    return values


def _is_rank(value: Any) -> bool:
    return value is None or _is_number(value, int)


def _is_score(value: Any) -> bool:
    return _is_number(value, int) or (_is_number(value, float) and math.isfinite(value))


def _is_number(value: Any, kinds: Any) -> bool:
    """Whether it is of these kinds; a bool is an int to Python, and none to JSON."""
    return isinstance(value, kinds) and not isinstance(value, bool)


def _value(record: Record, field: str, allowed: str, within: str = "") -> Any:
    if field not in record:
        raise InputError(
            f"field {within + field!r} is missing; got the fields {sorted(record)}; allowed: {allowed}; add it"
        )
    if record[field] is None:
        raise InputError(f"field {within + field!r} is null; allowed: {allowed}; fill it or delete the line")
    return record[field]


def _allowed_text(may_be_empty: bool = False) -> str:
    return "a string" if may_be_empty else "a string that is not empty"


def _checked_text(name: str, value: Any, allowed: str, may_be_empty: bool) -> str:
    if not isinstance(value, str):
        check_message_keys(name, value)
        raise InputError(
            f"field {name!r} is {_KINDS.get(type(value), type(value).__name__)}; allowed: {allowed}; write it as text, "
            "or choose the format 'messages' where it holds messages"
        )
    if not value and not may_be_empty:
        raise InputError(f"field {name!r} is ''; allowed: {allowed}; fill it or delete the line")
    check_utf8(name, value)
    return value
