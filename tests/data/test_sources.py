"""What `--data` says is told apart, opened and named; wrong names and files are errors that say what they are."""

import bz2
import gzip
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from huggingface_hub import errors

import jaxdpo
from jaxdpo.data.sources import CsvFile, JsonArray, JsonLines, open_sources
from jaxdpo.data.tables import ArrowDataset, ParquetFile
from jaxdpo.hub import HubUnreachable
from jaxdpo.types import InputError

RECORDS = [{"prompt": f"{i}+{i}=", "chosen": f" {2 * i}", "rejected": " é"} for i in range(600)]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
ARRAY = json.dumps(RECORDS, indent=1).encode()
CSV = b"prompt,chosen,rejected\n" + b"".join(",".join(record.values()).encode() + b"\r\n" for record in RECORDS)
BOM = b"\xef\xbb\xbf"


def parquet(records=RECORDS) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(records), sink)
    return sink.getvalue().to_pybytes()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a file into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(content: bytes, name: str = "data.jsonl") -> str:
        Path(name).write_bytes(content)
        return name

    return write


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with `one`, a saved data set, and `dict`, a saved dict of two."""
    root = tmp_path_factory.mktemp("saved")
    one, few = datasets.Dataset.from_list(RECORDS), datasets.Dataset.from_list(RECORDS[:5])
    one.save_to_disk(root / "one")
    datasets.DatasetDict({"train": one, "test": few}).save_to_disk(root / "dict")
    return root


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (LINES, "data.jsonl", JsonLines),
        (LINES, "data.csv", JsonLines),
        (b"\n \n" + LINES, "data.json", JsonLines),
        (gzip.compress(LINES), "data.jsonl", JsonLines),
        (LINES, "data.jsonl.gz", JsonLines),
        (zstd.compress(LINES), "data", JsonLines),
        (zstd.compress(LINES[:100]) + zstd.compress(LINES[100:]), "data.zst", JsonLines),
        (b"\x50\x2a\x4d\x18\x02\x00\x00\x00ab" + zstd.compress(LINES), "data.zst", JsonLines),
        (ARRAY, "data.json", JsonArray),
        (BOM + b" \n" + ARRAY, "data.jsonl", JsonArray),
        (zstd.compress(ARRAY), "data.csv", JsonArray),
        (CSV, "data.csv", CsvFile),
        (BOM + CSV, "DATA.CSV", CsvFile),
        (gzip.compress(CSV), "data.csv.gz", CsvFile),
        (parquet(), "data.parquet", ParquetFile),
        (parquet(), "data.jsonl", ParquetFile),
    ],
)
def test_files_are_told_by_content(write, content, name, kind):
    (source,) = open_sources(write(content, name))
    assert type(source) is kind
    assert source.name == name
    first = 1 + 2 * content.startswith(b"\n") if kind is JsonLines else 0
    assert source.unit == ("line" if kind is JsonLines else "row")
    assert list(source.records()) == list(enumerate(RECORDS, start=first))
    assert list(source.records()) == list(enumerate(RECORDS, start=first)), "a source can be read again"
    assert source.digest() == hashlib.blake2b(content, digest_size=32).hexdigest()
    assert source.num_records() in ((600,) if kind is ParquetFile else (None,))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(parquet()), "a compressed Parquet file; unpack it"),
        (bz2.compress(LINES), "a bzip2 file; unpack it"),
        (gzip.compress(gzip.compress(LINES)), "compressed twice; unpack it once"),
        (b"PK\x03\x04\x14\x00", "a zip archive or a workbook; unpack it, or export the sheet as CSV"),
        (LINES.decode().encode("utf-16"), "UTF-16 text; convert it to UTF-8"),
    ],
)
def test_foreign_files_are_named(write, content, what):
    with pytest.raises(InputError, match=f"^data file data.jsonl is {what}; allowed: JSON lines, a JSON array, CSV or"):
        open_sources(write(content))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("gone.jsonl", r"^data file gone\.jsonl cannot be read \(No such file or directory\); allowed: "),
        ("a\0b", r"^data file 'a\\x00b' cannot be read, it has a NUL character"),
        ("a" * 300, r"cannot be read \(File name too long\)"),
        ("loop", r"^data file loop cannot be read \(Too many levels of symbolic links\)"),
        ("pipe", r"^data file pipe cannot be read, it is no regular file; allowed: "),
        (
            "full",
            r"^data directory full holds a\.jsonl, b\.jsonl; allowed: a directory written by datasets' save_to_disk, "
            r"or tfds:DIRECTORY; for the files in it write 'full/\*\.jsonl'$",
        ),
        ("full/", r"; for the files in it write 'full/\*\.jsonl'$"),
        ("empty", r"^data directory empty holds nothing; .*; name data files themselves, with commas between them$"),
        ("full/*.csv", r"^data='full/\*\.csv' matches no file; allowed: JSON lines, .*; correct the pattern"),
        ("full/a.jsonl,b[0]", r"^data='b\[0\]' matches no file"),
        ("*", r"^data directory empty holds nothing"),
        ("s3://full/*", r"^data file s3://full/\* cannot be read .*; download it, then name the file"),
        ("", r"^data='' names an empty source"),
        ("full/a.jsonl,", r"^data='full/a\.jsonl,' names an empty source"),
        ("full/a.jsonl,gone.jsonl", r"^data file gone\.jsonl cannot be read"),
        ("hf:", r"^hf: names no data set; allowed: hf:NAME or hf:ORG/NAME"),
        ("hf:a/b/c", r"^hf:a/b/c names no data set"),
        ("tfds:", r"^tfds: names no data set; allowed: tfds:NAME or tfds:DIRECTORY"),
    ],
)
def test_names_of_nothing(tmp_path, monkeypatch, name, complaint):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    for path in ("full", "empty"):
        Path(path).mkdir()
    for path in ("full/a.jsonl", "full/b.jsonl"):
        Path(path).write_bytes(LINES)
    with pytest.raises(InputError, match=complaint):
        open_sources(name)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no file here that can be opened and not read")
def test_a_disk_that_does_not_give_the_bytes():
    with pytest.raises(InputError, match=r"^data file /proc/self/mem cannot be read \(Input/output error"):
        open_sources("/proc/self/mem")


def test_several_sources_stand_between_commas(write):
    for name in ("a.jsonl", "b,c.jsonl", "d"):
        write(LINES, name)
    names = [source.name for source in open_sources("a.jsonl, d,b,c.jsonl,a.jsonl")]
    assert names == ["a.jsonl", "d", "b,c.jsonl", "a.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("?.json*,b.jsonl", ["a.jsonl", "b.jsonl", "c.json", "b.jsonl"]),
        ("[!a].jsonl", ["b.jsonl"]),
        ("sub/**/*.jsonl", ["sub/d.jsonl", "sub/sub/e.jsonl"]),
        ("f*.jsonl", ["f*.jsonl"]),
    ],
)
def test_a_pattern_stands_for_the_files_that_it_matches(write, pattern, names):
    Path("sub/sub").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "c.json", "sub/sub/e.jsonl", "sub/d.jsonl"):
        write(LINES, name)
    if pattern.startswith("f"):
        write(LINES, "f*.jsonl")
        write(LINES, "f2.jsonl")
    assert [source.name for source in open_sources(pattern)] == names


def test_a_pattern_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.jsonl").write_bytes(LINES)
    assert [source.name for source in open_sources("~/*.jsonl")] == [str(tmp_path / "data.jsonl")]


def test_a_path_is_what_it_is_called(write):
    """A file may be called like a data set of the hub or like a split of a directory."""
    Path("hf:org").mkdir()
    Path("dict").mkdir()
    for name in ("hf:org/name", "dict:test"):
        assert next(open_sources(write(LINES, name))[0].records()) == (1, RECORDS[0])


def test_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.jsonl").write_bytes(b"{")
    with pytest.raises(InputError, match=r"^~/data\.jsonl, line 1: bad JSON"):
        list(open_sources("~/data.jsonl")[0].records())


@pytest.mark.parametrize(
    ("name", "count"), [("one", 600), ("dict", 600), ("dict:train", 600), ("dict:test", 5), ("dict/test", 5)]
)
def test_saved_data_sets(saved, monkeypatch, name, count):
    monkeypatch.chdir(saved)
    (source,) = open_sources(name)
    assert isinstance(source, ArrowDataset) and source.unit == "row"
    assert list(source.records()) == list(enumerate(RECORDS[:count]))
    assert source.num_records() == count
    assert [file.suffix for file in source.files] == [".arrow"]


def test_digest_of_a_saved_data_set_is_of_its_content(saved, monkeypatch, tmp_path):
    monkeypatch.chdir(saved)
    whole, test, copy = (open_sources(name)[0].digest() for name in ("dict", "dict:test", "dict:train"))
    assert whole == copy != test
    shutil.copytree("dict", tmp_path / "other")
    assert open_sources(str(tmp_path / "other"))[0].digest() == whole


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("dict:dev", r"^dict:dev has no split 'dev'; allowed: 'train', 'test'; write dict:SPLIT"),
        ("one:train", r"^one:train: one is one data set without splits; leave ':train' out"),
    ],
)
def test_splits_that_a_directory_lacks(saved, monkeypatch, name, complaint):
    monkeypatch.chdir(saved)
    with pytest.raises(InputError, match=complaint):
        open_sources(name)


ARROW = "data-00000-of-00001.arrow"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (ARROW, b""),
        (ARROW, b"{}"),
        (ARROW, None),
        ("state.json", b"{}"),
        ("state.json", None),
        ("dataset_info.json", b""),
    ],
)
def test_damaged_saved_data_sets(saved, tmp_path, monkeypatch, file, content):
    shutil.copytree(saved / "one", tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    Path("one", file).unlink()
    if content is not None:
        Path("one", file).write_bytes(content)
    with pytest.raises(InputError, match=r"^(one cannot be|data directory one holds)"):
        list(open_sources("one")[0].records())


@pytest.fixture
def cached(tmp_path):
    """A home of the Hugging Face libraries whose cache holds the data set org/prefs with 600 records."""
    (tmp_path / "data.jsonl").write_bytes(LINES)
    cache = tmp_path / "home" / "datasets"
    datasets.load_dataset("json", data_files=str(tmp_path / "data.jsonl"), cache_dir=str(cache))
    (made,) = cache.glob("json/*/*/*/")
    of_hub = cache / "org___prefs" / "default" / "0.0.0" / made.name
    of_hub.mkdir(parents=True)
    for file in made.iterdir():
        shutil.copy(file, of_hub / file.name.replace("json-", "prefs-"))
    return tmp_path / "home"


def test_a_silent_hub_leaves_the_cached_copy(cached):
    """In a process of its own: the libraries read their environment when they are imported."""
    program = """
        from jaxdpo.data import sources, tables
        from jaxdpo.hub import HubUnreachable
        tables.HUB_TIMEOUT = 0.5
        for name in ("hf:org/prefs", "hf:org/prefs:train[:10%]", "hf:org/none"):
            try:
                source = sources.open_sources(name)[0]
                print(name, source.num_records(), next(source.records()))
            except HubUnreachable as error:
                print(error)
    """
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # accepts, and never answers
        env = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(cached),
            "PYTHONPATH": str(Path(jaxdpo.__file__).parents[1]),
        }
        start = time.monotonic()
        command = [sys.executable, "-c", textwrap.dedent(program)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100)
        seconds = time.monotonic() - start
    whole, part, none = done.stdout.splitlines()
    assert whole == f"hf:org/prefs 600 {(0, RECORDS[0])}"
    assert part == f"hf:org/prefs:train[:10%] 60 {(0, RECORDS[0])}"
    assert none.startswith("hf:org/none: the hub is not reachable (")
    assert seconds < 20


ANSWER = mock.Mock(headers={})


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (errors.RepositoryNotFoundError("x", response=ANSWER), InputError, "the hub has no data set 'org/name'"),
        (errors.GatedRepoError("x", response=ANSWER), InputError, "hf:org/name is gated; accept its terms at https://"),
        (ConnectionError("proxy says no"), HubUnreachable, r"^hf:org/name: the hub is not reachable \(proxy says no\)"),
        (errors.OfflineModeIsEnabled(), HubUnreachable, "OfflineModeIsEnabled"),
    ],
)
def test_answers_of_the_hub(monkeypatch, error, kind, message):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", mock.Mock(side_effect=error))
    monkeypatch.setattr(datasets, "load_dataset", mock.Mock(side_effect=OSError("not in the cache")))
    with pytest.raises(InputError, match=message) as raised:
        open_sources("hf:org/name")
    assert type(raised.value) is kind


def test_a_data_set_of_the_hub(monkeypatch):
    """The split is train unless stated; what `datasets` complains of is passed on with the way out."""
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", mock.Mock())
    load = mock.Mock(return_value=datasets.Dataset.from_list(RECORDS))
    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = open_sources("hf:org/name:test[:10%]")
    assert list(source.records()) == list(enumerate(RECORDS))
    open_sources("hf:name")
    assert load.call_args_list == [mock.call("org/name", split="test[:10%]"), mock.call("name", split="train")]
    load.side_effect = ValueError("Config name is missing.\nPlease pick one")
    with pytest.raises(
        InputError, match=r"^hf:name cannot be loaded .*\(Config name is missing\.\); .*save_to_disk\(DIR"
    ):
        open_sources("hf:name")


def test_nothing_is_loaded_that_is_not_needed(write):
    program = """
        import sys
        from jaxdpo.data.sources import open_sources
        for source in open_sources("data.jsonl,data.json,data.csv"):
            list(source.records())
        print({"pyarrow", "datasets", "tensorflow_datasets", "jax", "pandas"} & set(sys.modules))
        list(open_sources("data.parquet")[0].records())
        print({"datasets", "tensorflow_datasets", "jax", "pandas"} & set(sys.modules))
    """
    for content, name in ((LINES, "data.jsonl"), (ARRAY, "data.json"), (CSV, "data.csv"), (parquet(), "data.parquet")):
        write(content, name)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout == "set()\nset()\n", done.stderr
