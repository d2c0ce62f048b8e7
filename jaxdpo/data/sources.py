"""From a file to preferences: JSON lines, plain or gzipped, every complaint with file and line.

Lines are counted from 1, as editors do; where rows are named too, row 0 is line 1. Blank lines hold no record.
"""

import codecs
import dataclasses
import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from jaxdpo.data.formats import FORMATS, Unusable, describe_dropped, detect_format, preference_of
from jaxdpo.types import InputError, Origin, Preference

GZIP_MAGIC = b"\x1f\x8b"


@dataclasses.dataclass(frozen=True)
class LoadedPreferences:
    """The usable preferences of one file, and what became of the rest.

    Attributes:
      preferences: in file order.
      format: the name in `FORMATS` it was read with.
      dropped: `(origin, reason)` of every record that holds no preference.
      path: the file.
      digest: `file_digest` of it.
    """

    preferences: list[Preference]
    format: str
    dropped: tuple[tuple[Origin, str], ...]
    path: str
    digest: str

    def summary(self) -> str:
        """One line: how many preferences or judged completions, from where, and which lines were dropped."""
        labels = [preference.label for preference in self.preferences if preference.label is not None]
        what, good = ("completions", f", {sum(labels)} of them good") if labels else ("preferences", "")
        return f"{self.path}: {len(self.preferences)} {what} ({self.format}){good}, {describe_dropped(self.dropped)}"


def load_preferences(path: str | pathlib.Path, format: str = "auto") -> LoadedPreferences:
    """Reads every preference of a data file.

    Args:
      path: `.jsonl` or `.jsonl.gz`.
      format: a name in `FORMATS`, or `auto` to tell it from the first record.
    Raises:
      InputError: if the file cannot be read, a record breaks the format, or no record is usable; with file and line.
    """
    source = str(path)
    if format != "auto" and format not in FORMATS:
        raise InputError(f"format={format!r} is unknown; allowed: 'auto', {', '.join(map(repr, FORMATS))}")
    preferences: list[Preference] = []
    dropped: list[tuple[Origin, str]] = []
    for line, record in read_records(path):
        origin = Origin(source, line)
        if format == "auto":
            try:
                format = detect_format(record)
            except InputError as error:
                raise InputError(f"{origin}: {error}") from None
        try:
            preferences.append(preference_of(record, FORMATS[format], origin))
        except Unusable as reason:
            dropped.append((origin, str(reason)))
    if not preferences:
        raise InputError(
            f"{source}: none of its {len(dropped)} records is usable, {describe_dropped(dropped)}; "
            "allowed: at least one prompt with two different completions, or with one and its label; correct the file"
        )
    return LoadedPreferences(preferences, format, tuple(dropped), source, file_digest(path))


def read_records(path: str | pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with its line, from 1; gzip is told by content, not by name.

    Raises:
      InputError: if the file is missing, a directory, empty, a broken gzip or not UTF-8, or if a line is not one JSON
        object; with file and line.
    """
    number, found = 0, False
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # some editors on Windows write it
                if line.strip():
                    found = True
                    yield number, _object(line, f"{path}, line {number}")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}, behind line {number}: the gzip stream is broken ({error}); allowed: a whole .gz file; "
            "copy or download it again"
        ) from None
    if not found:
        raise InputError(f"{path} holds no record; allowed: one JSON object per line; check how the file was written")


def file_digest(path: str | pathlib.Path) -> str:
    """BLAKE2b of the file's bytes, 256 bits in hexadecimal (`b2sum -l 256` prints the same)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _open(path: str | pathlib.Path) -> IO[bytes]:
    """The file opened for reading bytes, unzipped if its content is gzip."""
    if pathlib.Path(path).exists() and not pathlib.Path(path).is_file():  # a pipe would be drained by the first look
        kind = "a directory" if pathlib.Path(path).is_dir() else "no regular file"
        raise InputError(f"data file {path} cannot be read, it is {kind}; allowed: a .jsonl or .jsonl.gz file")
    try:
        with open(path, "rb") as file:
            zipped = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    except OSError as error:
        raise InputError(
            f"data file {path} cannot be read ({error.strerror}); allowed: a .jsonl or .jsonl.gz file; check the path"
        ) from None
    return cast(IO[bytes], gzip.open(path)) if zipped else open(path, "rb")


def _object(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a line holds; `where` is file and line, for the message."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {line[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "allowed: UTF-8 text; convert the file"
        ) from None
    except (ValueError, RecursionError) as error:
        start = line[:60].decode(errors="replace").strip()
        raise InputError(
            f"{where}: bad JSON ({error}); got {start!r}; allowed: one JSON object per line; correct the line"
        ) from None
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: the line holds a JSON {type(value).__name__}; allowed: one JSON object per line, {{...}}; "
            "write one object per line, not one list for the file"
        )
    return value
