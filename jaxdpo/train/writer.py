"""`metrics.jsonl`: one JSON object per optimizer step, whole lines only, continued exactly after a resume."""

import json
import os
from pathlib import Path

from jaxdpo.disk import writing
from jaxdpo.types import InputError


class MetricsWriter:
    """Appends rows to a JSON-lines file; a row that was written outlives a kill of this process."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Opens the file and cuts rows whose `step` is above `resume_step`, and a torn last line.

        Raises:
          RunStopped: if the disk is full or read-only; the file is as it was.
        """
        kept = [row for row in _whole_rows(path) if row["step"] <= resume_step] if resume_step > 0 else []
        temporary = path.with_suffix(".tmp")
        self._path = path
        with writing(path):
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
            os.replace(temporary, path)
            # Unbuffered: a row is with the system once it is written, and a full disk is heard of once, not at close.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 -- held open for the whole run

    def write(self, row: dict[str, float]) -> None:
        """Appends one row, so that it outlives this process.

        Raises:
          RunStopped: if the disk is full. It holds a torn line then, which a resume cuts.
        """
        line = (json.dumps(row) + "\n").encode()
        with writing(self._path):
            while line:  # a disk takes what still fits, and says at the next call that it is full
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def last_step(path: Path) -> int:
    """The step of the last row of a `metrics.jsonl`; 0 without one."""
    return max((int(row["step"]) for row in _whole_rows(path)), default=0)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All rows of a `metrics.jsonl`; InputError if there is none."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; allowed: the metrics.jsonl of a run; fix: start the run first")
    return _whole_rows(path)


def _whole_rows(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was torn by a kill
        try:
            rows.append({**json.loads(line)})
            rows[-1]["step"] + 0
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number}: no row of metrics with its step ({error}); fix: restore it, or give another "
                "--output-dir"
            ) from error
    return rows
