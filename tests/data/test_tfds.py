"""Every source becomes a data set of TensorFlow Datasets and comes back as it was, without TensorFlow."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

import jaxdpo.data.tfds
from jaxdpo.data.sources import open_sources
from jaxdpo.data.tfds import build_tfds
from jaxdpo.types import InputError, RunStopped

RECORDS = [
    {"prompt": f"{i}+{i}=", "chosen": " é \ud83d \U0001f600 \0", "ranks": [None, 1.5, i], "tools": [{"a": [[], {}]}]}
    for i in range(700)
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(records, name: str = "data.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def build(records=RECORDS, **options) -> Path:
    return build_tfds({"train": open_sources(write(records))}, "sets", **options)


def test_records_come_back_as_they_were(monkeypatch):
    monkeypatch.setattr(jaxdpo.data.tfds, "RECORDS_PER_FILE", 300)
    few = open_sources(write(RECORDS[:3], "few.jsonl"))
    path = build_tfds({"train": open_sources(write(RECORDS)) + few, "test": few}, "sets", name="sums", version="1.2.3")
    assert path == Path("sets/sums/1.2.3")
    (train,), (test,) = open_sources(f"tfds:{path}"), open_sources(f"tfds:{path}:test")
    assert list(train.records()) == list(enumerate([*RECORDS, *RECORDS[:3]]))
    assert list(train.records()) == list(enumerate([*RECORDS, *RECORDS[:3]])), "a source can be read again"
    assert list(test.records()) == list(enumerate(RECORDS[:3]))
    assert (train.num_records(), test.num_records(), train.unit) == (703, 3, "row")
    assert [len(train.files), len(test.files)] == [3, 1]
    (part,) = open_sources(f"tfds:{path}:train[300:310]")
    assert list(part.records()) == list(enumerate(RECORDS[300:310]))
    assert len({source.digest() for source in (train, test, part)}) == 3
    assert [file.name for file in path.parent.iterdir()] == ["1.2.3"], "nothing unfinished is left"


def test_tensorflow_datasets_reads_it():
    build()
    data = tfds.data_source("preferences", split="train[:10]", data_dir="sets")
    assert [json.loads(example["json"]) for example in data] == RECORDS[:10]


def test_data_sets_are_found_by_name(monkeypatch):
    """In a process of its own: the library reads its environment when it is imported. TensorFlow is not loaded."""
    build(name="sums", version="1.0.0")
    build(RECORDS[:5], name="sums", version="1.1.0")
    program = (
        "import sys\n"
        "from jaxdpo.data.sources import open_sources\n"
        "for name in ('tfds:sums', 'tfds:sums:1.0.0', 'tfds:sums:1.0.0:train[:10%]', 'tfds:none'):\n"
        "    try: print(name, open_sources(name)[0].num_records())\n"
        "    except ValueError as error: print(error)\n"
        "print({'tensorflow', 'torch', 'jax'} & set(sys.modules))"
    )
    monkeypatch.setenv("TFDS_DATA_DIR", "sets")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *found, missing, loaded = done.stdout.splitlines()
    assert found == ["tfds:sums 5", "tfds:sums:1.0.0 700", "tfds:sums:1.0.0:train[:10%] 70"], done.stderr
    assert missing.startswith("tfds:none is not prepared on this machine (")
    assert missing.endswith("prepare it with tfds.builder('none').download_and_prepare(file_format='array_record')")
    assert loaded == "set()"


def test_features_of_tfds_become_what_json_holds():
    features = tfds.features
    info = tfds.core.DatasetInfo(
        builder=tfds.core.DatasetIdentity("own", tfds.core.Version("1.0.0"), "own/1.0.0", module_name="own"),
        features=features.FeaturesDict(
            {
                "prompt": features.Text(),
                "completions": features.Sequence(features.Text()),
                "ranks": features.Sequence(np.int64),
                "label": np.bool_,
                "margin": np.float32,
                "chosen": features.Sequence({"role": features.Text(), "content": features.Text()}),
                "meta": {"source": features.Text(), "vector": features.Tensor(shape=(2,), dtype=np.float32)},
                "none": features.Sequence(features.Text()),
            }
        ),
        description="",
    )
    record = {
        "prompt": "é",
        "completions": ["a", "b"],
        "ranks": [2, 1],
        "label": True,
        "margin": 0.5,
        "chosen": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        "meta": {"source": "x", "vector": [0.5, 2.0]},
        "none": [],
    }
    Path("own/1.0.0").mkdir(parents=True)
    writer = tfds.core.SequentialWriter(info, 10, file_format="array_record")
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [record]})
    writer.close_all()
    ((row, read),) = open_sources("tfds:own/1.0.0")[0].records()
    assert (row, read) == (0, record)
    assert json.loads(json.dumps(read)) == record, "no NumPy value is left"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "My set"}, r"^name 'My set' is none for TFDS; allowed: \[a-z\]\[a-z0-9_\]\*"),
        ({"version": "1"}, r"^version '1' is none for TFDS"),
    ],
)
def test_names_that_tfds_does_not_take(options, complaint):
    with pytest.raises(InputError, match=complaint):
        build(**options)
    with pytest.raises(InputError, match=r"^split 'Train' is none for TFDS"):
        build_tfds({"Train": open_sources(write(RECORDS))}, "sets")


def test_a_data_set_is_never_overwritten():
    build()
    with pytest.raises(InputError, match=r"^sets/preferences/1\.0\.0 is there already; allowed: a new data set; state"):
        build(RECORDS[:1])


def test_a_source_that_breaks_off_leaves_nothing():
    Path("data.jsonl").write_text(json.dumps(RECORDS[0]) + "\n{")
    with pytest.raises(InputError, match=r"^data\.jsonl, line 2: bad JSON"):
        build_tfds({"train": open_sources("data.jsonl")}, "sets")
    assert list(Path("sets/preferences").iterdir()) == []


def test_values_that_json_does_not_know():
    pq.write_table(pa.table({"prompt": ["a"], "when": pa.array([0], pa.timestamp("s"))}), "data.parquet")
    with pytest.raises(InputError, match=r"^data\.parquet, row 0: .*datetime is not JSON serializable; .*as text$"):
        build_tfds({"train": open_sources("data.parquet")}, "sets")


def test_a_place_that_cannot_be_written():
    Path("sets").write_text("a file")
    with pytest.raises(RunStopped, match=r"sets/preferences/1\.0\.0 cannot be written"):
        build()


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: (path / "dataset_info.json").unlink(), r"is not prepared on this machine \(.*\); name the dir"),
        (lambda path: (path / "dataset_info.json").write_text("{"), "is not prepared on this machine"),
        (lambda path: (path / "features.json").write_text("{}"), "is not prepared on this machine|cannot be read"),
        (lambda path: next(path.glob("*train*")).unlink(), "cannot be read"),
        (lambda path: next(path.glob("*train*")).write_bytes(b""), "cannot be read"),
        (lambda path: shutil.copy("data.jsonl", next(path.glob("*train*"))), "cannot be read"),
    ],
    ids=range(6),
)
def test_damaged_data_sets(spoil, complaint):
    path = build()
    spoil(path)
    with pytest.raises(InputError, match=f"^tfds:{path}.*({complaint})"):
        list(open_sources(f"tfds:{path}")[0].records())


@pytest.mark.parametrize(
    ("split", "complaint"),
    [
        ("dev", r"cannot be read \(Unknown split 'dev'\..*\); allowed: of the splits train$"),
        ("train[5:3]", r"cannot be read .*; allowed: of the splits train$"),
        ("train[9:9]", r"cannot be read .*; allowed: of the splits train$"),
    ],
)
def test_splits_that_are_none(split, complaint):
    with pytest.raises(InputError, match=complaint):
        list(open_sources(f"tfds:{build()}:{split}")[0].records())


def test_other_file_formats_are_refused():
    path = build()
    info = path / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(InputError, match=r"has files of the format 'tfrecord'; allowed: 'array_record'"):
        open_sources(f"tfds:{path}")
