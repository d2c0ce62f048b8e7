"""Damages valid data of every kind in every way, and reads it: nothing but `InputError` and `Unusable` may come of it.

    python benchmarks/fuzz_readers.py --seconds 120

Files and saved data sets of every source and format are changed by flipped bits, cuts, splices, tokens of JSON and CSV,
and JSON values of the wrong kind. Each is read to its end, and every record converted in every format. Found are other
exceptions, messages that do not name the source, reads of over ten seconds, and crashes, which is why the work is done
in a process of its own. Each line printed is a case to look at: `--only CASE` reads it alone, with its traceback, and
leaves what it read in `--directory`. Exit status 0 if nothing is found.
"""

import argparse
import contextlib
import csv
import gzip
import io
import itertools
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from backports import zstd

from jaxdpo.data.chat import plain
from jaxdpo.data.content import Unusable
from jaxdpo.data.formats import FORMATS, detect_format, preference_of
from jaxdpo.data.sources import open_sources
from jaxdpo.data.tfds import build_tfds
from jaxdpo.types import InputError, Origin

SECONDS_PER_CASE = 10
TURN = "\n\nHuman: Hi\n\nAssistant:"
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+2="}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("4 é", "5 \U0001f600"))
RECORDS: dict[str, dict[str, Any]] = {
    "pairs": {"prompt": "2+2=", "chosen": " 4 é", "rejected": " 5", "margin": 0.5},
    "implicit": {"chosen": "2+2= 4", "rejected": "2+2= 5"},
    "hh": {"chosen": TURN + " Hello.", "rejected": TURN + " Go \U0001f600."},
    "ranked": {"prompt": "", "completions": [" 4", " 5", " 22"], "ranks": [1, None, 2]},
    "scored": {"prompt": "2+2=", "completions": [" 4", " 5"], "scores": [1.5, -3]},
    "unpaired": {"prompt": "2+2=", "completion": " 4", "label": True},
    "completion": {"prompt": "2+2=", "completion": " 4"},
    "text": {"text": "2+2=4"},
    "explicit": {"prompt": CHAT, "chosen": YES, "rejected": NO, "chat_template_kwargs": {"thinking": False}},
    "turns": {"chosen": CHAT + YES, "rejected": CHAT + NO},
    "judged": {"prompt": CHAT, "completion": YES, "label": False, "tools": [{"type": "function"}]},
    "messages": {"messages": CHAT + YES},
}
VALUES = [None, True, 0, -1, 1e308, 10**25, "", " ", "é\ud83d", "\0", [], {}, [[]], [None], [{}], {"role": 1}, "\n" * 9]
TOKENS = [b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\u", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf"]
TOKENS += [b"NaN", b"null", b"1e999", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"PAR1", b"\x1f\x8b", b"(\xb5/\xfd"]


class Hang(BaseException):
    """A read that takes too long; no library takes it for an error of its own."""


def valid_sources(root: Path) -> list[str]:
    """Writes every kind of source, one of each format where it is of text; returns their names, relative to `root`."""
    for name, record in RECORDS.items():
        lines = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for _ in range(8))
        (root / f"{name}.jsonl").write_bytes(lines)
        (root / f"{name}.json").write_text(json.dumps([record] * 8, indent=1))
        text = io.StringIO()
        rows = csv.writer(text)
        cells = [value if isinstance(value, str) else json.dumps(value) for value in record.values()]
        rows.writerows([list(record), *[cells] * 8])
        (root / f"{name}.csv").write_text(text.getvalue())
        plain_table = {**record, "chat_template_kwargs": None, "tools": None}
        pq.write_table(pa.Table.from_pylist([plain_table] * 600), root / f"{name}.parquet", compression="none")
    (root / "pairs.jsonl.gz").write_bytes(gzip.compress((root / "pairs.jsonl").read_bytes()))
    (root / "pairs.json.zst").write_bytes(zstd.compress((root / "pairs.json").read_bytes()))
    pq.write_table(pa.Table.from_pylist([RECORDS["ranked"]] * 600), root / "snappy.parquet", row_group_size=200)
    saved = datasets.Dataset.from_list([RECORDS["explicit"]] * 600)
    saved.save_to_disk(root / "saved")
    build_tfds({"train": open_sources(str(root / "ranked.jsonl"))}, root / "tfds")
    files = sorted(path.name for path in root.iterdir() if path.is_file())
    return [*files, *["saved", "tfds:tfds/preferences/1.0.0"] * 6]


def flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] if rng.random() < 0.7 else data[rng.randrange(len(data)) :]


def splice(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    at = rng.randrange(len(data))
    return data[:at] + data[start:end] + data[at + rng.choice([0, end - start]) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.choice(TOKENS) + data[at + rng.choice([0, 1]) :]


def replace_values(data: bytes, rng: random.Random) -> bytes:
    """Puts values of the wrong kind into JSON; other data has a bit flipped."""
    try:
        texts = [data] if data[:1] == b"[" else data.splitlines()
        values = [json.loads(text) for text in texts]
    except (ValueError, RecursionError):
        return flip(data, rng)
    changed = [_with_value(value, rng) if rng.random() < 0.5 else value for value in values]
    return "\n".join(map(json.dumps, changed)).encode()


def _with_value(value: Any, rng: random.Random) -> Any:
    if not value or not isinstance(value, list | dict) or rng.random() < 0.2:
        return rng.choice(VALUES)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        return [*value[:at], _with_value(value[at], rng), *value[at + 1 :]]
    field = rng.choice(list(value))
    return {**value, field: _with_value(value[field], rng)}


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [flip, cut, splice, insert, replace_values, replace_values]


def damage(root: Path, name: str, rng: random.Random) -> None:
    """Changes one file of a source."""
    path = root / name.removeprefix("tfds:")
    file = rng.choice(sorted(path.iterdir())) if path.is_dir() else path
    data = file.read_bytes()
    for _ in range(rng.choice([1, 1, 2, 3])):
        data = rng.choice(MUTATIONS)(data, rng) if data else data
    file.write_bytes(data)


def read(name: str) -> str:
    """Reads a source to its end, every record in every format; returns what came of it."""
    reached = Counter[str]()
    try:
        for source in open_sources(name):
            for number, record in source.records():
                origin = Origin(source.name, number, source.unit)
                with contextlib.suppress(InputError):
                    detect_format(record)
                for convert in FORMATS.values():
                    try:
                        preference_of(record, convert, origin, plain)
                        reached["preference"] += 1
                    except (InputError, Unusable) as error:
                        assert isinstance(error, Unusable) or str(error).startswith(str(origin)), error
    except InputError as error:
        assert name in str(error), f"the message does not name the source: {error}"
        return "refused"
    return "read" if reached else "no preference"


def run_case(seed: int, sources: list[str], valid: Path, root: Path) -> str:
    """Damages a copy of a valid source as `seed` says, and reads it; raises what was found."""
    rng = random.Random(seed)
    name = rng.choice(sources)
    top = name.removeprefix("tfds:").split("/")[0]
    shutil.rmtree(root / top) if (root / top).is_dir() else (root / top).unlink(missing_ok=True)
    (shutil.copytree if (valid / top).is_dir() else shutil.copy)(valid / top, root / top)
    damage(root, name, rng)
    with contextlib.chdir(root):
        signal.alarm(SECONDS_PER_CASE)
        try:
            return read(name)
        finally:
            signal.alarm(0)


def too_long(*_: Any) -> None:
    raise Hang(f"over {SECONDS_PER_CASE} s")


def fuzz(cases: Iterable[int], valid: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Runs cases; yields each with what came of it, or with the traceback of what was found."""
    sources = valid_sources(valid)
    for seed in cases:
        (root / "case").write_text(str(seed))  # names the case to the parent, should this process crash
        try:
            yield seed, run_case(seed, sources, valid, root)
        except (Exception, Hang):
            yield seed, traceback.format_exc()


def child(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGALRM, too_long)
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    end = time.monotonic() + args.seconds
    cases = itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(args.first))
    outcomes = Counter[str]()
    with tempfile.TemporaryDirectory() as valid:
        for seed, outcome in fuzz(cases if args.only is None else [args.only], Path(valid), args.directory):
            outcomes[outcome if "\n" not in outcome else "found"] += 1
            if "\n" in outcome:
                print(f"case {seed}: {outcome if args.only is not None else outcome.splitlines()[-1]}", flush=True)
    print(f"{outcomes.total()} cases:", ", ".join(f"{count} {what}" for what, count in sorted(outcomes.items())))
    return int(outcomes["found"] > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--first", type=int, default=0, help="the first case, and so which ones")
    parser.add_argument("--only", type=int, help="one case, in this process")
    parser.add_argument("--directory", type=Path, default=None, help="where cases are read; a temporary one")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.directory = args.directory or Path(tempfile.mkdtemp(prefix="fuzz-"))
    args.directory.mkdir(parents=True, exist_ok=True)
    if args.child or args.only is not None:
        return child(args)
    found, first, end = 0, args.first, time.monotonic() + args.seconds
    while (left := end - time.monotonic()) > 0:
        command = [sys.executable, __file__, "--child", "--first", first, "--seconds", left, "--directory"]
        status = subprocess.run([*map(str, command), str(args.directory)]).returncode
        found |= status
        if status >= 0:
            break
        crashed = int((args.directory / "case").read_text())
        print(f"case {crashed}: {signal.Signals(-status).name}", flush=True)
        first = crashed + 1
    return int(found != 0)


if __name__ == "__main__":
    sys.exit(main())
