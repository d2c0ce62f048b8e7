"""The records of a file of JSON, one at a time: JSON lines or a JSON array; plain, gzip or zstd, told by content.

Memory holds one record and about a megabyte, whatever the size of the file. What is wrong is said with file and place:
lines count from 1, as editors do, rows from 0. A byte-order mark is skipped, and so are blank lines.
"""

import codecs
import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from backports import zstd  # python-zstandard and PyArrow take a file that was cut short for a whole one

from jaxdpo.data.fields import shown
from jaxdpo.data.records import ALLOWED, Numbered, Record, how_to_name
from jaxdpo.types import InputError

CHUNK = 1 << 20
"""Bytes read at once."""

_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": zstd.open,
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": zstd.open for i in range(16)},  # skippable frames, as pzstd begins with
}
"""First bytes of a compressed file -> what opens it."""

_SPACE = re.compile(r"[ \t\n\r]*")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of a byte that is not UTF-8; nothing else decodes to it."""


@contextlib.contextmanager
def open_content(name: str, path: Path, place: Callable[[], str] = lambda: "at its start") -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed.

    Args:
      name: the file as the user wrote it.
      path: where it is.
      place: says how far the body has come.
    Raises:
      InputError: if the file cannot be opened or read on, or if its compressed stream is broken.
    """
    if "\0" in str(path):
        raise InputError(f"data file {name!r} cannot be read, it has a NUL character; {ALLOWED}; correct the name")
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(
            f"data file {name} cannot be read ({error.strerror}); {ALLOWED}; {how_to_name(name)}"
        ) from None
    try:
        opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
        with opener(path, "rb") as file:
            yield cast(IO[bytes], file)
    except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
        raise InputError(
            f"{name}, {place()}: the compressed stream is broken ({error}); allowed: a whole .gz or .zst file; "
            "copy or download it again"
        ) from None
    except OSError as error:
        raise InputError(
            f"data file {name} cannot be read, {place()} ({error.strerror}); {ALLOWED}; check the path and the disk"
        ) from None


def json_lines(name: str, path: Path) -> Numbered:
    """The objects of a file of JSON lines, each with its line.

    Raises:
      InputError: if a line is not one JSON object in UTF-8, or none holds one.
    """
    number, found = 0, False
    with open_content(name, path, lambda: f"behind line {number}") as file:
        for number, line in text_lines(file, name):
            if line.strip():
                found = True
                yield number, _object(line, f"{name}, line {number}")
    if not found:
        raise no_record(name)


def json_array(name: str, path: Path) -> Numbered:
    """The objects of a file that is one JSON array, each with its row.

    The standard library parses, one element at a time. (ijson's C backend writes "?" for half of a surrogate pair, and
    100 000 opening brackets use up its memory.)

    Raises:
      InputError: if an element is no object, or the text is no JSON array in UTF-8, or an empty one.
    """
    row = 0
    with open_content(name, path, lambda: f"before row {row}") as file:
        text = _Window(file)
        text.expect("[", name)
        closed = text.peek() == "]"
        if closed:
            raise no_record(name)
        while not closed:
            yield row, text.take_object(f"{name}, row {row}")
            closed = text.expect(",]", f"{name}, behind row {row}") == "]"
            row += 1
        if rest := text.peek():
            raise InputError(
                f"{name}, behind row {row - 1}: {rest!r} follows the array's end; allowed: one JSON array, or one "
                "object per line; write a file for each array"
            )


def text_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8, each with its number; only line feeds end them.

    Raises:
      InputError: if a line is not UTF-8.
    """
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # spreadsheets and some editors on Windows write it
        try:
            yield number, line.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}, line {number}: byte {line[error.start]:#04x} at offset {error.start} is not UTF-8; "
                "allowed: UTF-8 text; convert the file"
            ) from None


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
        ) from None
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

    def take_object(self, where: str) -> Record:
        """Steps over an object, and returns it."""
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
        if bad := _NOT_UTF8.search(self._text, self._at, end):
            raise InputError(
                f"{where}: byte {ord(bad[0]) - 0xDC00:#04x} is not UTF-8; allowed: UTF-8 text; convert the file"
            )
        self._at = end
        return _checked_object(value, where)

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
