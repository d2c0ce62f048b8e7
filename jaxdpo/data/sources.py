"""From what `--data` says to the records: files, saved data sets, the Hugging Face hub, TensorFlow Datasets.

A file is told by its content, whatever its name; CSV alone, which nothing marks, by a name that ends in `.csv`. All is
read in constant memory, and every message begins with the source as the user wrote it.
"""

import codecs
import glob
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

from jaxdpo.data.files import open_content
from jaxdpo.data.readers import json_array, json_lines
from jaxdpo.data.records import ALLOWED, Numbered, OnError, Source, raise_error
from jaxdpo.data.spreadsheets import csv_rows
from jaxdpo.data.tables import ParquetFile, open_hub, open_saved
from jaxdpo.data.tfds import open_tfds
from jaxdpo.disk import LFS_POINTER
from jaxdpo.types import InputError

SCHEMES: dict[str, Callable[[str, str, str], Source]] = {"hf:": open_hub, "tfds:": open_tfds}
"""What a name may begin with -> what opens it, given the name, what follows in it, and the split."""

_SPLIT = re.compile(r"(.+?)(?::([A-Za-z]\w*(?:\[[^\]]*\])?(?:\+.+)?))?", re.DOTALL)
"""A name and its split: `:train`, `:test[:10%]`, `:train+test`; a version, `:1.0.0`, is part of the name."""

_PATTERN = re.compile(r"(?!hf:|tfds:|\w+://)[^\0]*[*?\[][^\0]*")
"""A name with wildcards; the brackets of `hf:` and `tfds:` take a part of a split."""

_CSV_NAME = re.compile(r".*\.csv(\.gz|\.zst)?", re.IGNORECASE | re.DOTALL)
_PARQUET = b"PAR1"
_FOREIGN = {
    _PARQUET: "a compressed Parquet file; unpack it",
    b"PK\x03\x04": "a zip archive or a workbook; unpack it, or export the sheet as CSV",
    b"BZh9": "a bzip2 file; unpack it",
    b"\xfd7zXZ": "an xz file; unpack it",
    b"\x1f\x8b": "compressed twice; unpack it once",
    b"ARROW1": "an Arrow file; write Parquet",
    b"\xff\xff\xff\xff": "an Arrow stream; name the directory that save_to_disk wrote",
    b"\x89HDF": "an HDF5 file; write Parquet",
    b"SQLite format 3\0": "an SQLite data base; export a table as CSV",
    b"\xd0\xcf\x11\xe0": "an old workbook; export the sheet as CSV",
    b"ustar": "a tar archive; unpack it",
    b"\x93NUMPY": "a NumPy array; write JSON lines",
    **{b"\x80" + bytes([i]): "a pickle, which can run code and is never read; write JSON lines" for i in range(2, 6)},
    LFS_POINTER: "a Git LFS pointer, not the file itself; fetch it: git lfs pull",
    **dict.fromkeys(
        (b"<!DOCTYPE", b"<!doctype", b"<html", b"<?xml"), "a web page, perhaps of an error; download the file itself"
    ),
    codecs.BOM_UTF16_LE: "UTF-16 text; convert it to UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16 text; convert it to UTF-8",
}
"""First bytes of what is given for a data file by mistake -> what it is, and the fix."""
_BEHIND = {b"ustar": 257}
"""Where they are if not at the start."""


class JsonLines(Source):
    """A file with one JSON object per line."""

    unit: ClassVar[Literal["line", "row"]] = "line"

    def records(self, on_error: OnError = raise_error) -> Numbered:
        return json_lines(self.name, self.files[0], on_error)


class JsonArray(Source):
    """A file that is one JSON array of objects."""

    def records(self, on_error: OnError = raise_error) -> Numbered:
        return json_array(self.name, self.files[0], on_error)


class CsvFile(Source):
    """A CSV file with a header."""

    def records(self, on_error: OnError = raise_error) -> Numbered:
        return csv_rows(self.name, self.files[0], on_error)


def open_sources(data: str) -> list[Source]:
    """The sources that `--data` names.

    Args:
      data: one source, or several with commas between them. A source is a file of JSON lines, a JSON array, CSV or
        Parquet; a directory that `datasets.save_to_disk` wrote, or `DIRECTORY:SPLIT`; `hf:NAME[:SPLIT]`, a data set of
        the Hugging Face hub; `tfds:NAME[:SPLIT]` or `tfds:DIRECTORY[:SPLIT]`, one of TensorFlow Datasets. The split is
        `train` unless stated. A pattern, `DIRECTORY/*.jsonl`, stands for what it matches, in the order of the names,
        each of them a source. A path that exists is one source, commas and wildcards and all.
    Raises:
      InputError: if a source is missing, unreadable or of no known kind; begins with its name.
    """
    return [_open_source(path) for name in _names(data) for path in _matches(name)]


def _names(data: str) -> Iterator[str]:
    parts = data.split(",")
    while parts:
        paths = {size: ",".join(parts[:size]) for size in range(len(parts), 0, -1)}
        size = next((size for size, path in paths.items() if os.path.exists(path)), 1)
        name = paths[size] if os.path.exists(paths[size]) else paths[size].strip()
        if not name:
            raise InputError(f"data={data!r} names an empty source; allowed: sources with commas between; delete one")
        yield name
        parts = parts[size:]


def _matches(name: str) -> list[str]:
    """The paths that a pattern matches; of any other name the name."""
    path = os.path.expanduser(name)
    if os.path.exists(path) or not _PATTERN.fullmatch(name):
        return [name]
    if not (matches := sorted(glob.glob(path, recursive=True))):
        raise InputError(
            f"data={name!r} matches no file; {ALLOWED}; correct the pattern, in which * stands for any part of a name"
        )
    return matches


def _open_source(name: str) -> Source:
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike pathlib's, it takes every text for a path
        return open_saved(name, path, "")
    for scheme, open_named in SCHEMES.items():
        if name.startswith(scheme) and not os.path.exists(path):
            return open_named(name, *_with_split(name.removeprefix(scheme)))
    directory, split = _with_split(name)
    if split and not os.path.exists(path) and os.path.isdir(Path(directory).expanduser()):
        return open_saved(name, Path(directory).expanduser(), split)
    return _open_file(name, path)


def _with_split(name: str) -> tuple[str, str]:
    match = _SPLIT.fullmatch(name)
    return (match[1], match[2] or "") if match else (name, "")


def _open_file(name: str, path: Path) -> Source:
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be drained by the first look
        raise InputError(f"data file {name} cannot be read, it is no regular file; {ALLOWED}; write it to a file")
    with open_content(name, path) as file:
        start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8)
        if start.startswith(_PARQUET) and isinstance(file, io.BufferedReader):
            return ParquetFile(name, (path,))
    for magic, what in _FOREIGN.items():
        if start.startswith(magic, _BEHIND.get(magic, 0)):
            raise InputError(f"data file {name} is {what}; {ALLOWED}, plain, or gzip or zstd around text")
    first = start.lstrip()[:1]
    if first == b"[":
        return JsonArray(name, (path,))
    return CsvFile(name, (path,)) if _CSV_NAME.fullmatch(path.name) and first != b"{" else JsonLines(name, (path,))
