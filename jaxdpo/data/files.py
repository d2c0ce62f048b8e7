"""The bytes and the lines of a data file: plain, gzip or zstd, told by content."""

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from backports import zstd  # python-zstandard and PyArrow take a file that was cut short for a whole one

from jaxdpo.data.records import ALLOWED, how_to_name
from jaxdpo.types import InputError

_OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\x28\xb5\x2f\xfd": zstd.open,
    **{bytes([0x50 + i]) + b"\x2a\x4d\x18": zstd.open for i in range(16)},  # skippable frames, as pzstd begins with
}
"""First bytes of a compressed file -> what opens it."""


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


def text_lines(file: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """The lines of a file in UTF-8, each with its number; only line feeds end them.

    Raises:
      InputError: if a line is not UTF-8.
    """
    for number, line in numbered_lines(file):
        yield number, decoded(line, f"{name}, line {number}")


def numbered_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, each with its number from 1, without a byte-order mark; only line feeds end them."""
    for number, line in enumerate(file, start=1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line  # some editors on Windows write it


def decoded(line: bytes, where: str) -> str:
    """The text of a line in UTF-8; `where` is file and line, for the message."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {line[error.start]:#04x} at offset {error.start} is not UTF-8; "
            "allowed: UTF-8 text; convert the file"
        ) from None
