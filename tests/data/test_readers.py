"""Every record of a text or Parquet file, its place, and the message for each way in which the file can be wrong."""

import codecs
import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from jaxdpo.data import readers
from jaxdpo.data.sources import open_sources
from jaxdpo.types import InputError

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
LINE = json.dumps(PAIR).encode()


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The numbered records of a file with this content."""
    monkeypatch.chdir(tmp_path)

    def read(content: bytes, name: str = "data.jsonl"):
        Path(name).write_bytes(content)
        return list(open_sources(name)[0].records())

    return read


# --- JSON lines


def test_lines_are_counted_from_one_and_blank_ones_hold_no_record(read):
    assert read(LINE + b"\n\n  \r\n" + LINE + b"\r\n\n") == [(1, PAIR), (4, PAIR)]


def test_last_line_needs_no_line_end(read):
    assert read(LINE) == [(1, PAIR)]


def test_only_line_feeds_end_lines(read):
    record = {**PAIR, "chosen": " a\u2028b\x85c"}
    assert read(json.dumps(record, ensure_ascii=False).encode() + b"\n" + LINE) == [(1, record), (2, PAIR)]


def test_byte_order_mark_is_skipped(read):
    assert read(codecs.BOM_UTF8 + LINE) == [(1, PAIR)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"^data\.jsonl holds no record; allowed: JSON lines, a JSON array, CSV or Parquet, with at least one"),
        (b"\n \n", r"^data\.jsonl holds no record"),
        (gzip.compress(b""), r"^data\.jsonl holds no record"),
        (LINE + b"\n{'prompt': 1}\n", r"^data\.jsonl, line 2: bad JSON \(.*\); got \"\{'prompt': 1\}\""),
        (LINE + b"\n" + LINE[:-5], r"^data\.jsonl, line 2: bad JSON"),
        (LINE + LINE, r"^data\.jsonl, line 1: bad JSON \(Extra data"),
        (
            json.dumps(PAIR, indent=1).encode(),
            r"^data\.jsonl, line 1: bad JSON .*; allowed: one JSON object per line, one",
        ),
        (b"prompt,chosen,rejected\na,b,c", r"^data\.jsonl, line 1: bad JSON .* CSV in a file whose name ends in \.csv"),
        (LINE + b"\n" + b"[" * 100_000, r"^data\.jsonl, line 2: bad JSON"),
        (LINE + b'\n{"a": ' + b"1" * 5000 + b"}", r"^data\.jsonl, line 2: bad JSON \(Exceeds the limit"),
        (LINE + b"\nnull", r"^data\.jsonl, line 2: got null; allowed: a JSON object"),
        (LINE + b'\n{"prompt": "\xe9"}', r"^data\.jsonl, line 2: byte 0xe9 at offset 12 is not UTF-8"),
        (
            gzip.compress((LINE + b"\n") * 10_000)[:-12],
            r"^data\.jsonl, behind line [1-9]\d*: the compressed stream is broken \(Compressed file ended",
        ),
        (gzip.compress(LINE)[:-8] + b"\0" * 8, r"the compressed stream is broken \(CRC check failed"),
        (gzip.compress(LINE)[:10] + b"\xff" * 20, r"^data\.jsonl, at its start: the compressed stream is broken"),
        (gzip.compress(LINE) + b"more", r"^data\.jsonl, .*: the compressed stream is broken \(Not a gzipped file"),
        (zstd.compress(LINE)[:-2], r"^data\.jsonl, .*: the compressed stream is broken \(Compressed file ended before"),
        (zstd.compress(LINE) + b"more", r"^data\.jsonl, .*: the compressed stream is broken"),
    ],
    ids=range(18),
)
def test_broken_lines(read, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(content)


@pytest.mark.parametrize(
    "line",
    ["{", '{"prompt": "Q:",', '{"prompt": [', '  {"prompt": {"a": 1},  '],
    ids=["brace", "comma", "list", "space"],
)
def test_an_object_on_several_lines_is_recognised(read, line):
    with pytest.raises(InputError, match=r"line 1: bad JSON .*; correct the line, or write the object on one line$"):
        read(line.encode() + b"\n}")
    with pytest.raises(InputError, match=r"line 1: bad JSON .*; correct the line$"):
        read(b'{"prompt": "Q:"')


# --- JSON arrays


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_arrays_are_read_through_a_window_of_any_size(read, monkeypatch, chunk):
    monkeypatch.setattr(readers, "CHUNK", chunk)
    records = [
        {"a": [i, -1.5e-7, None, True, {}], "b": "é\U0001f600\ud83d\u2028\0" * i, "c": {"d": "]"}} for i in range(9)
    ]
    for text in (json.dumps(records), json.dumps(records, indent=2), json.dumps(records, separators=(",", ":"))):
        assert read(text.encode()) == list(enumerate(records))
    plain = [{"é": "مرحبا 🙂"}]
    assert read(codecs.BOM_UTF8 + json.dumps(plain, ensure_ascii=False).encode() + b" \n") == [(0, plain[0])]


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"[]", r"^data\.jsonl holds no record"),
        (b"[", r"^data\.jsonl, row 0: bad JSON \(Expecting value\); got ''"),
        (b"[{}, 1]", r"^data\.jsonl, row 1: got 1; allowed: a JSON object"),
        (b"[{}, {'a': 1}]", r"^data\.jsonl, row 1: bad JSON \(Expecting property name"),
        (b"[{},]", r"^data\.jsonl, row 1: bad JSON \(Expecting value\); got '\]'"),
        (b"[{} {}]", r"^data\.jsonl, behind row 0: bad JSON; got '\{'; allowed: , or \]"),
        (b"[{}", r"^data\.jsonl, behind row 0: bad JSON; got the end of the file; allowed: , or \]"),
        (b'[{"a": "b', r"^data\.jsonl, row 0: bad JSON \((Unterminated string|Invalid control)"),
        (b"[{}]\n[{}]", r"^data\.jsonl, behind row 0: '\[' follows the array's end"),
        (b'[{}, {"a": "\xe9"}]', r"^data\.jsonl, row 1: byte 0xe9 is not UTF-8"),
        (b"[{}]\xff", r"^data\.jsonl, behind row 0: '\\udcff' follows the array's end"),
        (b"[{}, " + b"[" * 100_000, r"^data\.jsonl, row 1: bad JSON"),
        (gzip.compress(b"[{}, {}]")[:-9], r"^data\.jsonl, .*: the compressed stream is broken"),
    ],
    ids=range(13),
)
def test_broken_arrays(read, monkeypatch, content, complaint, chunk):
    monkeypatch.setattr(readers, "CHUNK", max(chunk, len(content) // 100))
    with pytest.raises(InputError, match=complaint):
        read(content)


def test_a_mistake_in_an_array_is_found_without_the_rest_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "data.json"
    path.write_bytes(b"[{oops}, " + b" " * 1_000_000)
    reads = []
    more = readers._Window._more
    monkeypatch.setattr(readers, "CHUNK", 100)
    monkeypatch.setattr(readers._Window, "_more", lambda self: reads.append(1) or more(self))
    with pytest.raises(InputError, match="row 0: bad JSON"):
        list(open_sources(str(path))[0].records())
    assert len(reads) == 1


# --- CSV


def test_cells_become_what_their_field_holds(read):
    header = "prompt,completions,ranks,label,margin,topic,chosen"
    rows = [
        'Q:,"["" a"", "" b""]","[1, null]",True,0.5,7,"[{""role"": ""user"", ""content"": ""hi""}]"',
        '"a, ""b""\r\nc","[]",,false,,,[1]',
        ",,,,1e-3,,[{}]",
    ]
    assert read("\n".join([header, *rows, ""]).encode(), "data.csv") == [
        (
            0,
            {
                "prompt": "Q:",
                "completions": [" a", " b"],
                "ranks": [1, None],
                "label": True,
                "margin": 0.5,
                "topic": "7",
                "chosen": [{"role": "user", "content": "hi"}],
            },
        ),
        (
            1,
            {
                "prompt": 'a, "b"\r\nc',
                "completions": [],
                "ranks": None,
                "label": False,
                "margin": None,
                "topic": "",
                "chosen": "[1]",
            },
        ),
        (
            2,
            {
                "prompt": "",
                "completions": None,
                "ranks": None,
                "label": None,
                "margin": 0.001,
                "topic": "",
                "chosen": "[{}]",
            },
        ),
    ]


@pytest.mark.parametrize(("cell", "value"), [("1", "1"), ("0", "0"), (" TRUE", True), ("yes", "yes"), ("False", False)])
def test_only_true_and_false_are_labels(read, cell, value):
    assert read(f"label,margin\n{cell},much\n".encode(), "data.csv") == [(0, {"label": value, "margin": "much"})]


def test_blank_lines_are_no_rows(read):
    assert [row for row, _ in read(b"a,b\n\n1,2\n\r\n3,4\n\n", "data.csv")] == [0, 1]


def test_cells_may_be_long(read):
    assert read(b"a,b\n" + b"x" * 1_000_000 + b",y\n", "data.csv") == [(0, {"a": "x" * 1_000_000, "b": "y"})]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"^data\.csv holds no record"),
        (b"a,b\n", r"^data\.csv holds no record"),
        (b"a,b\n1,2\n1,2,3\n", r"^data\.csv, row 1: 3 cells below 2 names; allowed: one for each"),
        (b"a,b\n1\n", r"^data\.csv, row 0: 1 cells below 2 names"),
        (b"a,b,a\n1,2,3\n", r"^data\.csv, header: 'a' stands twice"),
        (b"prompt;chosen;rejected\n", r"^data\.csv, header: got names between semicolons; allowed: commas"),
        (b"prompt\tchosen\n", r"^data\.csv, header: got names between tabs"),
        (b'a,b\n1,2\n"x"y,2\n', r"^data\.csv, row 1: bad CSV at line 3 \(',' expected after '\"'\)"),
        (b'a,b\n1,"2\n3,4\n', r"^data\.csv, row 0: bad CSV at line 3 \(unexpected end of data\)"),
        (
            b'a,b\n1,"' + b"x\n" * (1 << 23) + b"y",
            r"^data\.csv, row 0: bad CSV at line \d+ \(field larger than field lim",
        ),
        (b"a,b\r1,2\r", r"^data\.csv, header: bad CSV at line 1 \(new-line character seen"),
        (b"a,b\n1,\0\n", r"^data\.csv, line 2: a NUL character; allowed: text"),
        (b"a,b\n1,2\n1,\xe9\n", r"^data\.csv, line 3: byte 0xe9 at offset 2 is not UTF-8"),
        (
            b'ranks,b\n"[1, 2",3\n',
            r"^data\.csv, row 0: cell 'ranks' is no JSON \(.*\); got '\[1, 2'; allowed: a JSON list",
        ),
        (
            b"prompt,b\n[{'role': 'user'}],3\n",
            r"^data\.csv, row 0: cell 'prompt' is no JSON .*; write the cell with json",
        ),
    ],
    ids=range(15),
)
def test_broken_csv(read, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(content, "data.csv")


# --- going on behind an error


@pytest.mark.parametrize(
    ("content", "name", "records", "errors"),
    [
        (
            b'\n{"a": 1}\n{\n[1]\n{"a": "\xe9"}\n \n{"a": 2}\n{"a"',
            "data.jsonl",
            [(2, {"a": 1}), (7, {"a": 2})],
            [(3, "bad JSON"), (4, "got a list"), (5, "byte 0xe9 at offset 7"), (8, "bad JSON")],
        ),
        (
            b'[{"a": 1}, 7, {"a": "\xe9"}, {"a": 2}, null]',
            "data.json",
            [(0, {"a": 1}), (3, {"a": 2})],
            [(1, "got 7"), (2, "byte 0xe9 is not UTF-8"), (4, "got null")],
        ),
        (
            b"a,ranks\n1,\n2\n\n3,x\n4,[1]\n5,[1],\n",
            "data.csv",
            [(0, {"a": "1", "ranks": None}), (3, {"a": "4", "ranks": [1]})],
            [(1, "1 cells below 2 names"), (2, "cell 'ranks' is no JSON"), (4, "3 cells below 2 names")],
        ),
    ],
)
def test_what_stands_behind_an_error_is_read_where_it_is_asked_for(tmp_path, content, name, records, errors):
    path = tmp_path / name
    path.write_bytes(content)
    (source,) = open_sources(str(path))
    found = []
    assert list(source.records(lambda number, error: found.append((number, str(error))))) == records
    assert [number for number, _ in found] == [number for number, _ in errors]
    for (number, message), (_, complaint) in zip(found, errors, strict=True):
        assert message.startswith(f"{path}, {source.unit} {number}: {complaint}")


@pytest.mark.parametrize(
    ("content", "name", "complaint"),
    [
        (gzip.compress((LINE + b"\n") * 10_000)[:-12], "data.jsonl", "the compressed stream is broken"),
        (b"[{}, {oops}, {}]", "data.json", "row 1: bad JSON"),
        (b'a,b\n1,"2\n', "data.csv", "row 0: bad CSV"),
        (b"{", "data.jsonl", None),
        (b" ", "data.jsonl", "holds no record"),
    ],
)
def test_a_stream_that_is_broken_ends_the_source(tmp_path, content, name, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    records = open_sources(str(path))[0].records(lambda number, error: None)
    if complaint is None:
        assert list(records) == []
    else:
        with pytest.raises(InputError, match=complaint):
            list(records)


# --- Parquet


def parquet(table: pa.Table, **options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def test_nested_columns_become_lists_and_objects(read):
    records = [
        {
            "prompt": f"{i} é",
            "completions": [" a"] * i,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]}],
            "label": None if i == 3 else i > 500,
            "margin": i / 8,
        }
        for i in range(1000)
    ]
    assert read(parquet(pa.Table.from_pylist(records), row_group_size=300)) == list(enumerate(records))


TABLE = pa.table({"prompt": ["Q:"] * 1000, "chosen": [f" {i}" for i in range(1000)]})
WHOLE = parquet(TABLE, compression="none", use_dictionary=False)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (WHOLE[:-1], r"^data\.jsonl is no whole Parquet file \(Parquet magic bytes not found"),
        (b"PAR1", r"^data\.jsonl is no whole Parquet file"),
        (b"PAR1" + b"\xff" * 300 + WHOLE[304:], r"^data\.jsonl(, behind row -?\d+:)? cannot be read"),
        (parquet(TABLE.slice(0, 0)), r"^data\.jsonl holds no record"),
        (parquet(pa.table([[1], [2]], names=["a", "a"])), r"^data\.jsonl has two columns of one name in \['a', 'a'\]"),
    ],
    ids=range(5),
)
def test_broken_parquet(read, content, complaint):
    with pytest.raises(InputError, match=complaint):
        read(content)


def test_a_broken_parquet_file_is_not_counted_either(read):
    with pytest.raises(InputError, match="is no whole Parquet file"):
        read(WHOLE[:-1])
    with pytest.raises(InputError, match="is no whole Parquet file"):
        open_sources("data.jsonl")[0].num_records()


# --- memory

CHILD = """
    import pathlib, sys
    import pyarrow.parquet
    from jaxdpo.data.sources import open_sources

    def anonymous():
        status = pathlib.Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) // 1024

    start = peak = anonymous()
    for count, _ in enumerate(open_sources(sys.argv[1])[0].records(), start=1):
        if count % 500 == 0:
            peak = max(peak, anonymous())
    print(count, peak - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its own memory from /proc")
@pytest.mark.parametrize("kind", ["jsonl.zst", "json.gz", "csv", "parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    """48 MB of records are read in half as much; PyArrow's own allocator would keep what it has freed."""
    record, count = {"prompt": "Q:" * 500, "chosen": " é" * 300, "rejected": " no"}, 24_000
    path = tmp_path / f"data.{kind}"
    line = json.dumps(record).encode()
    assert count * len(line) > 48e6
    if kind == "jsonl.zst":
        path.write_bytes(zstd.compress(line + b"\n") * count)
    elif kind == "json.gz":
        path.write_bytes(
            gzip.compress(b"[" + line) + gzip.compress((b"," + line) * 100) * (count // 100) + gzip.compress(b"]")
        )
    elif kind == "csv":
        path.write_bytes(b"prompt,chosen,rejected\n" + (",".join(record.values()).encode() + b"\n") * count)
    else:
        columns = {field: [f"{i}{text}" for i in range(count)] for field, text in record.items()}
        pq.write_table(pa.table(columns), path, use_dictionary=False, compression="none")
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(path)]
    env = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    read, grown = map(int, done.stdout.split())
    assert read == count + (kind == "json.gz"), done.stderr
    assert grown <= 24
