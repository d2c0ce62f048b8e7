"""Records that lie in Arrow tables: a Parquet file, a directory that `datasets` saved, a data set of the hub.

Rows are read a few hundred at a time; nested lists and structs become lists and objects. PyArrow and `datasets` are
loaded only for data that needs them.
"""

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxdpo.data.fields import Record
from jaxdpo.data.records import Numbered, OnError, Source, raise_error
from jaxdpo.hub import HUB_TIMEOUT, hub_error
from jaxdpo.types import InputError

ROWS_AT_ONCE = 256
DEFAULT_SPLIT = "train"

_DATA_FILE = re.compile(r"\.(jsonl|json|ndjson|csv|parquet)(\.gz|\.zst)?$", re.IGNORECASE)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclasses.dataclass(frozen=True)
class ParquetFile(Source):
    """A Parquet file."""

    def records(self, on_error: OnError = raise_error) -> Numbered:
        import pyarrow.parquet as pq  # 0.2 s

        with named_errors(f"{self.name} is no whole Parquet file"):
            # Unless both are said, a whole column chunk, in many files the whole column, is read at once.
            file = pq.ParquetFile(self.files[0], buffer_size=1 << 20, pre_buffer=False)
            names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise InputError(f"{self.name} has two columns of one name in {names}; allowed: each once; rename one")
        with file:
            batches = file.iter_batches(ROWS_AT_ONCE, use_threads=False)
            yield from numbered((_checked(batch).to_pylist() for batch in batches), self.name)

    def num_records(self) -> int:
        import pyarrow.parquet as pq

        with named_errors(f"{self.name} is no whole Parquet file"):
            return pq.read_metadata(self.files[0]).num_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrowDataset(Source):
    """A data set of `datasets`; its Arrow files are mapped to memory."""

    dataset: Any

    def records(self, on_error: OnError = raise_error) -> Numbered:
        def batches() -> Iterator[list[Record]]:
            for table in self.dataset.with_format("arrow").iter(ROWS_AT_ONCE):
                columns = self.dataset.features.decode_batch(_checked(table).to_pydict())
                yield [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

        return numbered(batches(), self.name)

    def num_records(self) -> int:
        return self.dataset.num_rows


def open_saved(name: str, directory: Path, split: str) -> ArrowDataset:
    """A directory that `datasets.save_to_disk` wrote.

    Args:
      name: as the user wrote it.
      directory: that of one data set, or of a `DatasetDict`.
      split: empty for one data set; for a dict empty stands for `train`.
    Raises:
      InputError: if it is no such directory, damaged, or has no such split; names those that it has.
    """
    with named_errors(f"data directory {name} cannot be read", "check its permissions"):
        content = sorted(path.name for path in directory.iterdir())
    if not {"state.json", "dataset_dict.json"} & set(content):
        holds = f"{', '.join(content[:5])}{', …' * (len(content) > 5)}" or "nothing"
        raise InputError(
            f"data directory {name} holds {holds}; allowed: a directory written by datasets' save_to_disk, or "
            f"tfds:DIRECTORY; {_how_to_name_files(name, content)}"
        )
    import datasets  # 0.7 s

    with named_errors(f"{name} cannot be loaded by datasets"):
        saved = datasets.load_from_disk(directory)
    if isinstance(saved, datasets.DatasetDict):
        wanted = split or DEFAULT_SPLIT
        if wanted not in saved:
            raise InputError(
                f"{name} has no split {wanted!r}; allowed: {', '.join(map(repr, saved))}; write {directory}:SPLIT"
            )
        saved = saved[wanted]
    elif split:
        raise InputError(f"{name}: {directory} is one data set without splits; leave ':{split}' out")
    return _arrow_dataset(name, saved)


def _how_to_name_files(directory: str, content: list[str]) -> str:
    """What to do about a directory that is named in place of the data files in it."""
    endings = Counter(match[0] for file in content if (match := _DATA_FILE.search(file)))
    if not endings:
        return "name data files themselves, with commas between them"
    return f"for the files in it write '{directory.rstrip('/')}/*{endings.most_common(1)[0][0]}'"


def open_hub(name: str, repository: str, split: str) -> ArrowDataset:
    """A data set of the hub, downloaded if need be; from the cache of `datasets` where the hub does not answer.

    Args:
      name: as the user wrote it.
      repository: `NAME` or `ORG/NAME`.
      split: as `datasets` writes it, `test` or `train[:10%]`; empty stands for `train`.
    Raises:
      HubUnreachable: if the hub does not answer within seconds and the data set is not in the cache.
      InputError: if there is no such data set or split, it is gated, or one of its configurations must be chosen.
    """
    if not _HUB_ID.fullmatch(repository):
        raise InputError(f"{name} names no data set; allowed: hf:NAME or hf:ORG/NAME, then :SPLIT; correct the name")
    import datasets
    import huggingface_hub

    wanted = split or DEFAULT_SPLIT
    try:
        # Asked first: load_dataset tries for 23 s to reach a hub that is not there.
        huggingface_hub.HfApi().repo_info(repository, repo_type="dataset", timeout=HUB_TIMEOUT)
    except Exception as error:  # among them errors of httpx or httpx2, by the release of huggingface_hub
        with contextlib.suppress(Exception), _offline():
            return _arrow_dataset(name, datasets.load_dataset(repository, split=wanted), wanted)
        raise hub_error(
            error,
            name=name,
            page=f"datasets/{repository}",
            missing=f"{name}: the hub has no data set {repository!r}",
            offline=f"{name}: the hub is not reachable ({{reason}}), and it is not in the cache of datasets either; "
            "check the connection, or name a file or a directory",
        ) from None
    with named_errors(
        f"{name} cannot be loaded by datasets",
        f"allowed: hf:NAME:SPLIT; where a configuration must be chosen, save it, "
        f"load_dataset({repository!r}, CONFIGURATION).save_to_disk(DIRECTORY), and name the directory",
    ):
        return _arrow_dataset(name, datasets.load_dataset(repository, split=wanted), wanted)


@contextlib.contextmanager
def named_errors(what: str, fix: str = "copy or write it again") -> Iterator[None]:
    """Turns whatever a library says of damaged data into one `InputError`; they raise errors of any kind."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} ({reason}); {fix}") from error


def numbered(batches: Iterable[list[Record]], name: str) -> Numbered:
    """The records of all batches, counted from 0.

    Raises:
      InputError: if the batches break off, or hold no record.
    """
    row, batches = 0, iter(batches)
    while True:
        with named_errors(f"{name}, behind row {row - 1}: cannot be read on" if row else f"{name} cannot be read"):
            batch = next(batches, None)
        if batch is None:
            break
        for record in batch:
            yield row, record
            row += 1
    if not row:
        raise InputError(f"{name} holds no record; allowed: at least one; check how it was written")


def _checked(table: Any) -> Any:
    """An Arrow table or batch whose offsets and texts are sound: PyArrow crashes on what is not, or reads beside it."""
    table.validate(full=True)
    return table


def _arrow_dataset(name: str, dataset: Any, split: str = "") -> ArrowDataset:
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    return ArrowDataset(name, files, split, dataset=dataset)


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """`datasets` looks into its cache alone; its environment variable is read once, when it is imported."""
    from datasets import config

    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before
