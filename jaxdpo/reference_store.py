"""Per-token log-probs on disk: a directory of three files that only ever grow, part by part.

  examples.i32   the examples, in the order in which they were computed
  values.f32     the log-probs of their scored tokens; how many are each one's follows from the dataset
  parts.jsonl    what the numbers follow from, then a line for each part: its groups, its tokens, a CRC-32 of both

A part counts once its line is whole, and the line is written when all else is on the disk: what a killed process left
behind the last part is written over. Reading takes 16 bytes an example, and of the log-probs the pages in use.
"""

import contextlib
import itertools
import json
import os
import pathlib
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import filelock
import numpy as np

from jaxdpo.disk import writing
from jaxdpo.reference import TokenLogps, located
from jaxdpo.types import InputError

COMMIT_SECONDS = 10.0
"""A part is written so often: what a killed process loses at most."""


class LogpStore:
    """One directory.

    Args:
      directory: whether or not it exists.
      facts: what the numbers follow from, JSON-able; those of another dataset or model are refused.
      slots: int `[examples]` scored tokens of every group of the dataset.
    """

    def __init__(self, directory: pathlib.Path, facts: dict[str, Any], slots: np.ndarray) -> None:
        self.directory = directory
        self._slots = slots
        self._header = json.dumps(facts, sort_keys=True, default=str)
        self._parts: list[_Part] = []
        self._checked = 0
        """How many of the parts were read and found as they were written."""
        self._text = b""
        """The whole lines of `parts.jsonl`."""

    def read(self) -> TokenLogps:
        """What it holds, memory-mapped; a part is checked when it is read first.

        Raises:
          InputError: if a file is not as it was written, or follows from something else.
        """
        before = self._text
        try:
            text = (self.directory / "parts.jsonl").read_bytes()
        except FileNotFoundError:
            text = b""
        self._text = text[: text.rfind(b"\n") + 1]  # a line that was not finished does not count
        self._parts = self._parsed()
        ends = itertools.accumulate(self._parts, _Part.after, initial=_Part(0, 0, 0))
        spans = list(itertools.pairwise(ends))
        total = spans[-1][1] if spans else _Part(0, 0, 0)
        example = self._mapped("examples.i32", "<i4", total.groups)
        values = self._mapped("values.f32", "<f4", total.tokens)
        if not self._text.startswith(before):
            self._checked = 0
        for start, end in spans[self._checked :]:
            if _crc(example[start.groups : end.groups], values[start.tokens : end.tokens]) != end.crc:
                raise self._unusable("values.f32", "is damaged, or examples.i32 beside it")
        self._checked = len(spans)
        return located(values, example, self._slots[example], len(self._slots))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within it no other run writes here; first it waits for one that does, and says so.

        Raises:
          RunStopped: if the disk is full or read-only.
        """
        lock = filelock.FileLock(self.directory / "lock")
        with self._writing():
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                print(f"reference  another run is computing {self.directory}: waiting for it")
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def extend(self, computed: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Adds what it had not yet when it was read, as it is computed; within `locked`.

        Args:
          computed: `(examples [groups], their log-probs one after another [tokens])`. What came before an exception or
            an interruption is kept.
        Raises:
          RunStopped: if the disk is full or read-only.
        """
        pending: list[tuple[np.ndarray, np.ndarray]] = []
        began = time.monotonic()
        try:
            for item in computed:
                pending.append(item)
                if time.monotonic() - began >= COMMIT_SECONDS:
                    self._commit(pending)
                    pending, began = [], time.monotonic()
        finally:
            self._commit(pending)

    def _commit(self, pending: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Writes a part behind the others."""
        if not pending:
            return
        example = np.concatenate([of for of, _ in pending]).astype("<i4")
        values = np.concatenate([of for _, of in pending]).astype("<f4")
        part = _Part(len(example), len(values), _crc(example, values))
        lines = [] if self._text else [self._header]
        text = "".join(f"{line}\n" for line in [*lines, json.dumps(part._asdict())]).encode()
        groups, tokens = (sum(of) for of in zip(*((0, 0), *(part[:2] for part in self._parts)), strict=True))
        with self._writing():
            for name, offset, data in (
                ("examples.i32", groups * example.itemsize, example.tobytes()),
                ("values.f32", tokens * values.itemsize, values.tobytes()),
                ("parts.jsonl", len(self._text), text),  # last
            ):
                _write_at(self.directory / name, offset, data)
        self._parts.append(part)
        self._text += text

    def _parsed(self) -> list["_Part"]:
        """The lines of `parts.jsonl` behind the first; InputError for what was not written there."""
        header, *lines = self._text.split(b"\n")[:-1] or [self._header.encode()]
        if header != self._header.encode():
            raise self._unusable(
                "parts.jsonl", "is damaged, or of another model or data than its directory's name says"
            )
        try:
            return [_Part(**json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            raise self._unusable("parts.jsonl", "is damaged") from None

    def _mapped(self, name: str, dtype: str, length: int) -> np.ndarray:
        if not length:
            return np.zeros(0, dtype)
        try:
            # A plain array: slices of numpy.memmap are made several times slower.
            return np.asarray(np.memmap(self.directory / name, dtype, mode="r", shape=(length,)))
        except (OSError, ValueError) as error:  # gone, or shorter
            raise self._unusable(name, f"does not hold the {length} numbers that were written ({error})") from error

    def _unusable(self, name: str, what: str) -> InputError:
        return InputError(f"{self.directory / name} {what}; fix: remove {self.directory}, it will be computed again")

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(
            self.directory,
            left="all that it holds may be deleted, and JAXDPO_CACHE can name a directory on another disk",
        )


class _Part(NamedTuple):
    """A line of `parts.jsonl`, or all parts up to one."""

    groups: int
    tokens: int
    crc: int
    """Of the part alone: its examples, then its values."""

    def after(self, part: "_Part") -> "_Part":
        """The end of a part that stands behind this end."""
        return _Part(self.groups + part.groups, self.tokens + part.tokens, part.crc)


def _crc(example: np.ndarray, values: np.ndarray) -> int:
    return zlib.crc32(values.data.cast("B"), zlib.crc32(example.data.cast("B")))


def _write_at(path: pathlib.Path, offset: int, data: bytes) -> None:
    """Makes `data` the end of a file, from `offset` on, and waits until the disk has it."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        file.truncate(offset)
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
