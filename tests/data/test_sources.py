import gzip
import hashlib
import json

import pytest

from jaxdpo.data.sources import file_digest, load_preferences, read_records
from jaxdpo.types import UNRANKED, InputError, Origin, Preference

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
LINE = json.dumps(PAIR).encode()
TURN = "\n\nHuman: Hi\n\nAssistant:"


@pytest.fixture
def write(tmp_path):
    def write(content: bytes, name: str = "data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def lines(*records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def test_rows_are_lines_and_blank_lines_hold_no_record(write):
    path = write(LINE + b"\n\n  \r\n" + LINE + b"\r\n\n")
    assert list(read_records(path)) == [(1, PAIR), (4, PAIR)]


def test_last_line_needs_no_line_end(write):
    assert list(read_records(write(LINE))) == [(1, PAIR)]


def test_only_line_feeds_end_lines(write):
    record = {**PAIR, "chosen": " a\u2028b\x85c"}
    path = write(json.dumps(record, ensure_ascii=False).encode() + b"\n" + LINE)
    assert list(read_records(path)) == [(1, record), (2, PAIR)]


def test_byte_order_mark_is_skipped(write):
    assert list(read_records(write(b"\xef\xbb\xbf" + LINE))) == [(1, PAIR)]


@pytest.mark.parametrize("name", ["data.jsonl.gz", "data.jsonl"])
def test_gzip_is_told_by_content(write, name):
    assert list(read_records(write(gzip.compress(LINE), name))) == [(1, PAIR)]


def test_plain_text_may_be_called_gz(write):
    assert list(read_records(write(LINE, "data.jsonl.gz"))) == [(1, PAIR)]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"data\.jsonl holds no record; allowed: one JSON object per line"),
        (b"\n \n", r"data\.jsonl holds no record"),
        (gzip.compress(b""), r"data\.jsonl holds no record"),
        (LINE + b"\n{'prompt': 1}\n", r"data\.jsonl, line 2: bad JSON \(.*\); got \"\{'prompt': 1\}\""),
        (LINE + b"\n" + LINE[:-5], r"data\.jsonl, line 2: bad JSON"),
        (b"{\n" + LINE, r"data\.jsonl, line 1: bad JSON"),
        (LINE + b"\n" + b"[" * 100_000, r"data\.jsonl, line 2: bad JSON"),
        (b"\n[" + LINE + b"]", r"data\.jsonl, line 2: the line holds a JSON list"),
        (LINE + b"\nnull", r"data\.jsonl, line 2: the line holds a JSON NoneType"),
        (LINE + b'\n{"prompt": "\xe9"}', r"data\.jsonl, line 2: byte 0xe9 at offset 12 is not UTF-8"),
        (LINE.decode().encode("utf-16"), r"data\.jsonl, line 1: byte 0xff at offset 0 is not UTF-8"),
        (gzip.compress(LINE)[:-12], r"data\.jsonl, behind line 0: the gzip stream is broken"),
        (gzip.compress(LINE)[:-8] + b"\0" * 8, r"data\.jsonl, behind line [01]: the gzip stream is broken"),
        (gzip.compress(LINE)[:10] + b"\xff" * 20, r"data\.jsonl, behind line 0: the gzip stream is broken"),
    ],
    ids=str,
)
def test_broken_file_is_an_error_that_names_file_and_row(write, content, complaint):
    with pytest.raises(InputError, match=complaint):
        list(read_records(write(content)))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match=r"gone\.jsonl cannot be read \(No such file or directory\)"):
        load_preferences(tmp_path / "gone.jsonl")
    with pytest.raises(InputError, match=r"cannot be read, it is a directory"):
        load_preferences(tmp_path)


def test_load_pairs(write):
    path = write(lines(PAIR, {**PAIR, "rejected": " yes"}, {**PAIR, "prompt": "R:"}))
    loaded = load_preferences(path)
    assert loaded.format == "pairs"
    assert loaded.preferences == [
        Preference("Q:", (" yes", " no"), Origin(str(path), 1)),
        Preference("R:", (" yes", " no"), Origin(str(path), 3)),
    ]
    assert loaded.dropped == ((Origin(str(path), 2), "two completions are equal"),)
    assert loaded.digest == file_digest(path)
    assert loaded.summary() == f"{path}: 2 preferences (pairs), dropped 1: row 1 (line 2): two completions are equal"


def test_load_hh_drops_by_row_what_holds_no_preference(write):
    path = write(
        gzip.compress(
            lines(
                {"chosen": TURN + " Hello.", "rejected": TURN + " Go."},
                {"chosen": TURN + " ", "rejected": TURN + " Go."},
                {"chosen": TURN + " Hello.", "rejected": "\n\nHuman: Ho\n\nAssistant: Go."},
                {"chosen": TURN + " Same.", "rejected": TURN + " Same."},
            )
        ),
        "hh.jsonl.gz",
    )
    loaded = load_preferences(path)
    assert (loaded.format, len(loaded.preferences)) == ("hh", 1)
    assert loaded.dropped == (
        (Origin(str(path), 2), "a completion is empty"),
        (Origin(str(path), 3), "chosen and rejected have different prompts"),
        (Origin(str(path), 4), "two completions are equal"),
    )


def test_load_rankings(write):
    path = write(
        lines(
            {"prompt": "Q:", "completions": [" a", " b", " c"], "ranks": [None, 0, None]},
            {"prompt": "Q:", "completions": [" a", " b"]},
            {"prompt": "Q:", "completions": [" a", " b"], "scores": [1, 1]},
        )
    )
    loaded = load_preferences(path)
    assert loaded.preferences == [
        Preference("Q:", (" b", " a", " c"), Origin(str(path), 1), ranks=(0, UNRANKED, UNRANKED)),
        Preference("Q:", (" a", " b"), Origin(str(path), 2)),
    ]
    assert loaded.summary() == f"{path}: 2 preferences (ranked), dropped 1: row 2 (line 3): all completions tie"


def test_load_judged_completions(write):
    path = write(
        lines(*({"prompt": "Q:", "completion": text, "label": text == " a"} for text in (" a", " b", " ", " a")))
    )
    loaded = load_preferences(path)
    assert [item.label for item in loaded.preferences] == [True, False, True]
    assert loaded.summary() == (
        f"{path}: 3 completions (unpaired), 2 of them good, dropped 1: row 2 (line 3): a completion is empty"
    )


def test_a_file_is_of_one_kind(write):
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: field 'completions' is missing"):
        load_preferences(write(lines({"prompt": "Q:", "completions": [" a", " b"]}, PAIR)))


def test_format_can_be_said(write):
    path = write(lines({"prompt": "x", "chosen": TURN + " Hello.", "rejected": TURN + " Go."}))
    assert load_preferences(path).format == "pairs"
    assert load_preferences(path, "hh").preferences[0].prompt == TURN


def test_errors_of_a_record_carry_file_and_row(write):
    path = write(lines(PAIR, {"prompt": "Q:", "chosen": " yes"}))
    with pytest.raises(InputError, match=r"data\.jsonl, line 2: field 'rejected' is missing"):
        load_preferences(path)
    with pytest.raises(InputError, match=r"data\.jsonl, line 1: no format fits a record with the fields \['text'\]"):
        load_preferences(write(lines({"text": "a"})))
    with pytest.raises(InputError, match=r"data\.jsonl, line 1: 2 formats fit a record with the fields \['chosen', "):
        load_preferences(write(lines({**PAIR, "completions": [" a", " b"]})))


def test_unknown_format(write):
    with pytest.raises(
        InputError, match=r"format='csv' is unknown; allowed: 'auto', 'pairs', 'hh', 'ranked', 'unpaired'$"
    ):
        load_preferences(write(LINE), "csv")


def test_a_file_of_unusable_records_is_an_error(write):
    complaint = (
        r"none of its 1 records is usable, dropped 1: row 0 \(line 1\): two completions are equal; "
        "allowed: at least one prompt with two different completions, or with one and its label"
    )
    with pytest.raises(InputError, match=complaint):
        load_preferences(write(lines({**PAIR, "rejected": " yes"})))


def test_digest_is_of_the_bytes(write):
    assert file_digest(write(LINE)) == hashlib.blake2b(LINE, digest_size=32).hexdigest()
