"""Groups on disk: one `.npy` file for each of `GroupArrays`, written chunk by chunk and read memory-mapped.

Writing takes the memory of one chunk; reading takes that of the pages in use, which the system takes back at will.
"""

import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdpo.data.groups import DTYPES, GroupArrays, TokenizedGroup, arrays_of

CHECKED_TOGETHER = 1 << 24
"""Bytes of a file that are read at a time to check it."""


class GroupWriter:
    """Writes groups into a directory; `finish` makes them readable.

    Args:
      directory: an existing one.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._columns = {name: _Column(directory / f"{name}.npy", np.dtype(dtype)) for name, dtype in DTYPES.items()}

    def append(self, groups: Sequence[TokenizedGroup], source: int) -> None:
        """Adds groups of one of the sources."""
        arrays = arrays_of(groups, [source] * len(groups))
        ids, segments = self._columns["ids"].length, self._columns["size"].length
        moved = arrays._replace(start=arrays.start + ids, first=arrays.first + segments)
        for name, values in moved._asdict().items():
            self._columns[name].append(values)

    def finish(self) -> dict[str, Any]:
        """Completes the files, and says what `open_groups` is to find in them."""
        return {name: column.finish() for name, column in self._columns.items()}

    def close(self) -> None:
        """Gives the files up as they are; nothing after `finish`."""
        for column in self._columns.values():
            column.close()


def open_groups(directory: pathlib.Path, facts: dict[str, Any]) -> GroupArrays:
    """The groups of a directory, memory-mapped.

    Args:
      directory: what a `GroupWriter` wrote into.
      facts: what its `finish` returned.
    Raises:
      ValueError: if a file is not as it was written, byte for byte.
      OSError: if one cannot be read.
    """
    for name, expected in facts.items():
        _check(directory / f"{name}.npy", expected)
    # As plain arrays: slices of numpy.memmap are made several times slower, and there are three for each group.
    return GroupArrays(*(np.asarray(np.load(directory / f"{name}.npy", mmap_mode="r")) for name in DTYPES))


class _Column:
    """One array, growing in its file: the header, padded for any length, is written again at the end."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype) -> None:
        self.length = 0
        self._dtype = dtype
        self._crc = 0
        self._file = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, self._dtype).data.cast("B")
        self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self.length += len(values)

    def finish(self) -> dict[str, int]:
        self._file.flush()
        size = self._file.tell()
        self._file.seek(0)
        self._write_header()
        self._file.close()
        return {"size": size, "crc": self._crc, "length": self.length}

    def close(self) -> None:
        self._file.raw.close()  # not the buffer: what it holds may not fit the disk

    def _write_header(self) -> None:
        np.lib.format.write_array_header_1_0(
            self._file,
            {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (self.length,)},
        )


def _check(path: pathlib.Path, expected: dict[str, int]) -> None:
    """ValueError if a file's size, header or data differ from what was written."""
    if os.path.getsize(path) != expected["size"]:
        raise ValueError(f"{path} has {os.path.getsize(path)} bytes; allowed: {expected['size']}")
    crc = 0
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        while block := file.read(CHECKED_TOGETHER):
            crc = zlib.crc32(block, crc)
    if (shape, dtype, crc) != ((expected["length"],), np.dtype(DTYPES[path.stem]), expected["crc"]):
        raise ValueError(f"{path} is damaged")
