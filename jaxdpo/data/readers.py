"""The records of a file of JSON, one at a time: JSON lines or a JSON array; plain, gzip or zstd, told by content.

Memory holds one record and about a megabyte, whatever the size of the file. What is wrong is said with file and place:
lines count from 1, as editors do, rows from 0. A byte-order mark is skipped, and so are blank lines.
"""

import codecs
import json
import re
from pathlib import Path
from typing import IO, Any, cast

from jaxdpo.data.fields import Record, shown
from jaxdpo.data.files import decoded, numbered_lines, open_content
from jaxdpo.data.records import ALLOWED, Numbered, OnError, raise_error
from jaxdpo.types import InputError

CHUNK = 1 << 20
"""Bytes read at once."""

_SPACE = re.compile(r"[ \t\n\r]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of a byte that is not UTF-8; nothing else decodes to it."""


def json_lines(name: str, path: Path, on_error: OnError = raise_error) -> Numbered:
    """The objects of a file of JSON lines, each with its line.

    Args:
      name: the file as the user wrote it.
      path: where it is.
      on_error: called for each line that is not one JSON object in UTF-8.
    Raises:
      InputError: if the file cannot be read on, or all its lines are blank.
    """
    number, found = 0, False
    with open_content(name, path, lambda: f"behind line {number}") as file:
        for number, line in numbered_lines(file):
            where = f"{name}, line {number}"
            try:
                text = decoded(line, where)
                if not text.strip():
                    continue
                record = _object(text, where)
            except InputError as error:
                on_error(number, error)
            else:
                yield number, record
            found = True
    if not found:
        raise no_record(name)


def json_array(name: str, path: Path, on_error: OnError = raise_error) -> Numbered:
    """The objects of a file that is one JSON array, each with its row.

    The standard library parses, one element at a time. (ijson's C backend writes "?" for half of a surrogate pair, and
    100 000 opening brackets use up its memory.)

    Args:
      name: the file as the user wrote it.
      path: where it is.
      on_error: called for each element that is no object, or not in UTF-8.
    Raises:
      InputError: if the text is no JSON array, or an empty one, or cannot be read on.
    """
    row = 0
    with open_content(name, path, lambda: f"before row {row}") as file:
        text = _Window(file)
        text.expect("[", name)
        closed = text.peek() == "]"
        if closed:
            raise no_record(name)
        while not closed:
            where = f"{name}, row {row}"
            value, not_utf8 = text.take_value(where)
            try:
                record = _checked_element(value, not_utf8, where)
            except InputError as error:
                on_error(row, error)
            else:
                yield row, record
            closed = text.expect(",]", f"{name}, behind row {row}") == "]"
            row += 1
        if rest := text.peek():
            raise InputError(
                f"{name}, behind row {row - 1}: {rest!r} follows the array's end; allowed: one JSON array, or one "
                "object per line; write a file for each array"
            )


def no_record(name: str) -> InputError:
    """What to say of a file without records."""
    return InputError(f"{name} holds no record; {ALLOWED}, with at least one record; check how the file was written")


def _object(line: str, where: str) -> Record:
    """The JSON object that a line holds; `where` is file and line, for the message."""
    try:
        value = json.loads(line, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: bad JSON ({error}); got {line[:60].strip()!r}; allowed: one JSON object per line, one array "
            "[{...}, ...] for the file, or CSV in a file whose name ends in .csv; correct the line"
            f"{_or_join(line)}"
        ) from None
    return _checked_object(value, where)


def _or_join(line: str) -> str:
    """What else to do about a line of an object that stands on several, as indenting writers leave it."""
    goes_on = line.lstrip().startswith("{") and line.rstrip().endswith(("{", "[", ","))
    return ", or write the object on one line" if goes_on else ""


def _checked_element(value: Any, not_utf8: re.Match | None, where: str) -> Record:
    if not_utf8:
        raise InputError(
            f"{where}: byte {ord(not_utf8[0]) - 0xDC00:#04x} is not UTF-8; allowed: UTF-8 text; convert the file"
        )
    return _checked_object(value, where)


def _checked_object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where}: got {shown(value)}; allowed: a JSON object {{...}} for each record; correct it")
    return value


def _each_key_once(entries: list[tuple[str, Any]]) -> Record:
    """The object of these entries; of a key that stands twice the standard library silently keeps the last value."""
    made = dict(entries)
    if len(made) < len(entries):
        keys = [key for key, _ in entries]
        raise ValueError(f"key {next(key for key in made if keys.count(key) > 1)!r:.60} stands twice in one object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_each_key_once)


class _Window:
    """The part of a file's text that is being parsed."""

    def __init__(self, file: IO[bytes]):
        self._file, self._text, self._at = file, "", 0
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._at = cast(re.Match, _SPACE.match(self._text, self._at)).end()
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def expect(self, characters: str, where: str) -> str:
        """Steps over one of `characters`, and returns it."""
        if (character := self.peek()) not in tuple(characters):
            got = ascii(character) if character else "the end of the file"
            raise InputError(f"{where}: bad JSON; got {got}; allowed: {' or '.join(characters)}; correct the file")
        self._at += 1
        return character

    def take_value(self, where: str) -> tuple[Any, re.Match | None]:
        """Steps over a value, and returns it with what stands for the first byte in it that is not UTF-8."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except (ValueError, RecursionError) as error:
                if self._may_be_cut(error) and self._more():
                    continue
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error  # positions mislead here
                raise InputError(
                    f"{where}: bad JSON ({reason}); got {self._text[self._at : self._at + 60]!a}; allowed: a JSON "
                    "object {...} for each record; correct it"
                ) from None
        not_utf8 = _NOT_UTF8.search(self._text, self._at, end)
        self._at = end
        return value, not_utf8

    def _may_be_cut(self, error: Exception) -> bool:
        """Whether the text may only have to go on; a mistake in it must not read the rest of the file."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos + len("-Infinity") >= len(self._text)

    def _more(self) -> bool:
        """Reads as much again as is there, so that a long record is parsed few times; False at the end."""
        data = self._file.read(max(CHUNK, len(self._text) - self._at))
        self._text = self._text[self._at :] + self._decode(data, not data)
        self._at = 0
        return bool(data)
