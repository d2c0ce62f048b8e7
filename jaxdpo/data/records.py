"""What a source of records is: something with a name that can be read from its start as often as need be."""

import abc
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal, NoReturn

from jaxdpo.data.fields import Record
from jaxdpo.types import InputError

Numbered = Iterator[tuple[int, Record]]
"""Records, each with the number of its line or row."""
OnError = Callable[[int, InputError], None]
"""Told of a line or row that holds no record, by its number; returns for the source to be read on."""

ALLOWED = "allowed: JSON lines, a JSON array, CSV or Parquet"

_HOW_TO_NAME = {
    r"\w+://.*": "download it, then name the file",
    r"[\w-]+/[\w.-]+(:\w+)?": "check the path; a data set of the hub is hf:{name}",
}
"""What is no path -> what to do instead."""


def how_to_name(name: str) -> str:
    """What to do about a name at which there is no file.

    Example:
      >>> how_to_name("trl-lib/tldr")
      'check the path; a data set of the hub is hf:trl-lib/tldr'
    """
    fits = (fix for pattern, fix in _HOW_TO_NAME.items() if re.fullmatch(pattern, name))
    return next(fits, "check the path").format(name=name)


def raise_error(number: int, error: InputError) -> NoReturn:
    """The `OnError` that ends the source."""
    raise error


@dataclasses.dataclass(frozen=True)
class Source(abc.ABC):
    """Records from one file or data set, read in constant memory.

    Attributes:
      name: as the user wrote it; begins every message.
      files: where the records lie on the disk.
      split: which part of `files` it is; empty: all of them.
      unit: what records are counted in: lines from 1, or rows from 0.
    """

    name: str
    files: tuple[Path, ...]
    split: str = ""
    unit: ClassVar[Literal["line", "row"]] = "row"

    @abc.abstractmethod
    def records(self, on_error: OnError = raise_error) -> Numbered:
        """The records from the first on, each with the line or row that `Origin.number` states.

        Args:
          on_error: called for each line or row that holds no record and does not hide those behind it.
        Raises:
          InputError: where the data cannot be read on, with the source's name and the place.
        """

    def num_records(self) -> int | None:
        """How many there are, if that is known without reading them."""
        return None

    def digest(self) -> str:
        """BLAKE2b of what it holds, 256 bits in hexadecimal: of a file's bytes, or of names and digests of several."""
        digests = [file_digest(file) for file in self.files]
        if len(digests) == 1 and not self.split:
            return digests[0]
        parts = [self.split, *(f"{file.name} {digest}" for file, digest in zip(self.files, digests, strict=True))]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=32).hexdigest()


def file_digest(path: Path) -> str:
    """BLAKE2b of the file's bytes, 256 bits in hexadecimal (`b2sum -l 256` prints the same)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
