"""TensorFlow Datasets without TensorFlow: reads array_record data sets that are on the disk, and builds such ones.

A data set that `build_tfds` makes has one feature, `json`: each record as JSON text. It holds records of every format,
with nested, ragged and absent fields, and gives back exactly those it was made from; TFDS's own features know no null,
and need TensorFlow for ragged lists of lists, which conversations are.
"""

import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdpo.data.fields import Record
from jaxdpo.data.records import Numbered, OnError, Source, raise_error
from jaxdpo.data.tables import DEFAULT_SPLIT, ROWS_AT_ONCE, named_errors, numbered
from jaxdpo.disk import writing
from jaxdpo.types import InputError, Origin

FEATURE = "json"
RECORDS_PER_FILE = 100_000

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsDataset(Source):
    """A split of a prepared data set; values of all features become what JSON would hold."""

    data: Any
    features: Any

    def records(self, on_error: OnError = raise_error) -> Numbered:
        def batches() -> Iterator[list[Record]]:
            for start in range(0, len(self.data), ROWS_AT_ONCE):
                rows = range(start, min(start + ROWS_AT_ONCE, len(self.data)))
                yield [_record(self.features, values) for values in self.data.__getitems__(rows)]

        return numbered(batches(), self.name)

    def num_records(self) -> int:
        return len(self.data)


def open_tfds(name: str, dataset: str, split: str) -> TfdsDataset:
    """A data set that lies prepared on the disk; nothing is downloaded or generated.

    Args:
      name: as the user wrote it.
      dataset: a directory with `dataset_info.json`, or `NAME[/CONFIG][:VERSION]` below `$TFDS_DATA_DIR`, else
        `~/tensorflow_datasets`.
      split: as TFDS writes it, `test` or `train[:10%]`; empty stands for `train`.
    Raises:
      InputError: if there is no such data set or split, or it is not of array_record files.
    """
    if not dataset:
        raise InputError(f"{name} names no data set; allowed: tfds:NAME or tfds:DIRECTORY, then :SPLIT; add the name")
    import tensorflow_datasets as tfds  # 0.9 s
    from tensorflow_datasets.core import read_only_builder  # tfds.builder would also take what is not prepared

    wanted, path = split or DEFAULT_SPLIT, Path(dataset).expanduser()
    fix = f"prepare it with tfds.builder({dataset!r}).download_and_prepare(file_format='array_record')"
    if path.is_dir():
        fix = "name the directory that holds dataset_info.json"
    with named_errors(f"{name} is not prepared on this machine", fix):
        builder = tfds.builder_from_directory(path) if path.is_dir() else read_only_builder.builder_from_files(dataset)
    format = builder.info.file_format.value if builder.info.file_format else None
    if format != "array_record":
        raise InputError(
            f"{name} has files of the format {format!r}; allowed: 'array_record'; prepare it again with "
            "download_and_prepare(file_format='array_record')"
        )
    with named_errors(f"{name} cannot be read", f"allowed: of the splits {', '.join(builder.info.splits)}"):
        data = builder.as_data_source(wanted)
        len(data)  # fails for a split such as train[5:3]
        stored = builder.info.splits[wanted].filepaths
        return TfdsDataset(name, tuple(map(Path, stored)), wanted, data=data, features=builder.info.features)


def build_tfds(
    splits: Mapping[str, Sequence[Source]],
    output_dir: str | Path,
    *,
    name: str = "preferences",
    version: str = "1.0.0",
) -> Path:
    """Writes sources as a data set of TensorFlow Datasets, in array_record files, offline and in constant memory.

    The records keep their order. `tfds:` with the returned directory reads them, and so does `tfds.data_source` with
    `data_dir=output_dir`.

    Args:
      splits: name of a split -> the sources that it is made of, as `open_sources` gives them.
      output_dir: the data set lies below it, in `name/version`.
      name: letters, digits and underscores, all in lower case.
      version: MAJOR.MINOR.PATCH.
    Returns:
      the directory of the data set.
    Raises:
      InputError: if a name or the version is malformed, the data set is there already, or a source cannot be read.
      RunStopped: if the disk is full or `output_dir` must not be written.
    """
    for text, pattern, kind in [
        (name, _NAME, "name"),
        (version, _VERSION, "version"),
        *((s, _NAME, "split") for s in splits),
    ]:
        if not pattern.fullmatch(text):
            raise InputError(f"{kind} {text!r} is none for TFDS; allowed: {pattern.pattern}; correct it")
    target = Path(output_dir).expanduser() / name / version
    if target.exists():
        raise InputError(f"{target} is there already; allowed: a new data set; state another version, or delete it")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target, then renamed: what is there is whole.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as scratch:
            unfinished = Path(scratch, version)
            unfinished.mkdir()
            _write(splits, unfinished, name, version)
            unfinished.rename(target)
    return target


def _write(splits: Mapping[str, Sequence[Source]], directory: Path, name: str, version: str) -> None:
    import tensorflow_datasets as tfds

    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity(name, tfds.core.Version(version), str(directory), module_name=__name__),
        description="One record per example, as JSON text.",
        features=tfds.features.FeaturesDict({FEATURE: tfds.features.Text()}),
        disable_shuffling=True,
    )
    # A GeneratorBasedBuilder that keeps the order sorts all examples by their number, in memory.
    writer = tfds.core.SequentialWriter(info, RECORDS_PER_FILE, file_format="array_record")
    writer.initialize_splits(list(splits))
    for split, sources in splits.items():
        examples = (
            {FEATURE: _json_text(record, Origin(source.name, number, source.unit))}
            for source in sources
            for number, record in source.records()
        )
        while batch := list(itertools.islice(examples, ROWS_AT_ONCE)):
            writer.add_examples({split: batch})
    writer.close_all()


def _json_text(record: Record, origin: Origin) -> str:
    try:
        return json.dumps(record)
    except (TypeError, ValueError) as error:  # Parquet has dates, decimals and bytes
        raise InputError(
            f"{origin}: {error}; allowed: text, numbers, booleans, null, lists and objects; write the field as text"
        ) from None


def _record(features: Any, values: Record) -> Record:
    """What the features' values of one example say.

    Raises:
      InputError: if the JSON text of `build_tfds` holds no object.
    """
    if list(features) != [FEATURE]:
        return _plain(features, values)
    record = json.loads(values[FEATURE])
    if not isinstance(record, dict):
        raise InputError(f"feature {FEATURE!r} holds a {type(record).__name__}; allowed: a JSON object; build it again")
    return record


def _plain(feature: Any, value: Any) -> Any:
    """A feature's value as JSON would hold it; a sequence of objects, which TFDS stores by field, item by item."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.generic):
        return value.item()
    item = getattr(feature, "feature", feature)  # of a sequence
    if not isinstance(value, dict):
        return [_plain(item, each) for each in value] if isinstance(value, Iterable) else value
    if item is feature:
        return {field: _plain(feature[field], each) for field, each in value.items()}
    columns = {field: [_plain(item[field], each) for each in column] for field, column in value.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
