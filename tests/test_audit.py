"""`jaxdpo audit`: every record of every source is seen, findings are printed and written, and the status says it."""

import json

import pytest
from matplotlib.figure import Figure

from jaxdpo.audit import run_audit
from jaxdpo.config import AuditConfig
from jaxdpo.data.audit import Audit
from jaxdpo.plots import save_lengths
from jaxdpo.types import InputError, Origin, Preference, RunStopped
from tests import tiny


def pairs(numbers, **change):
    return [{"prompt": f"Is {n} fine?", "chosen": f" yes {n}.", "rejected": f" no {n}."} | change for n in numbers]


def write(tmp_path, records, name="a.jsonl"):
    return str(tiny.write_records(tmp_path / name, records))


def audit_json(tmp_path, **options):
    """Exit status, and what is written."""
    path = tmp_path / "audit.json"
    status = run_audit(AuditConfig(json=str(path), **options))
    return status, json.loads(path.read_text("utf-8"))


def kinds(result):
    return {item["kind"]: item["records"] for item in result["findings"]}


def test_clean_data(tmp_path, capsys):
    data = write(tmp_path, pairs(range(30)))
    assert run_audit(AuditConfig(data=data, strict=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"data       {data} (pairs)", "records    30, of which 30 used: 30 pairs"]
    assert lines[-1] == "found      nothing to complain about"


@pytest.mark.parametrize("strict, status", [(False, 0), (True, 1)])
def test_warnings_are_the_status_only_if_asked_for(tmp_path, strict, status):
    data = write(tmp_path, [*pairs(range(30)), *pairs([3])])
    assert run_audit(AuditConfig(data=data, strict=strict)) == status


@pytest.mark.parametrize("strict", [False, True])
def test_notes_are_never_the_status(tmp_path, strict):
    data = write(tmp_path, [*pairs(range(30)), *pairs([31], chosen=" y\u200bes.")])
    assert run_audit(AuditConfig(data=data, strict=strict)) == 0


def test_every_broken_record_is_named(tmp_path, capsys):
    records = [{"prompt": "Q:"}, *pairs(range(3)), *pairs([7, 8, 9], chosen=5), *pairs([10]), *pairs([11], rejected="")]
    data = write(tmp_path, records)
    status, written = audit_json(tmp_path, data=data)
    assert status == 2
    result = written["data"]
    assert (result["records"], result["used"], result["formats"]) == (9, 4, {data: "pairs"})
    broken = kinds(result)["broken"]
    assert [message.split(":")[0] for message in broken] == [f"{data}, line {n}" for n in (1, 5, 6, 7, 9)]
    assert "no format fits" in broken[0] and "field 'chosen' is a number" in broken[1]
    out = capsys.readouterr().out
    assert f"error           5  records that break their format; {result['findings'][0]['fix']}\n" in out
    assert broken[2] in out and broken[3] not in out and "and 2 more" in out


def test_dropped_records_are_no_errors(tmp_path):
    data = write(tmp_path, [*pairs(range(9)), *pairs([9], chosen="  "), *pairs([10], chosen=" no 10.")])
    status, written = audit_json(tmp_path, data=data)
    assert status == 0
    dropped = {item["what"]: item["records"] for item in written["data"]["findings"]}
    assert dropped == {
        "dropped: a completion is empty": [f"{data}, line 10"],
        "dropped: two completions are equal": [f"{data}, line 11"],
    }


def test_no_usable_record_is_an_error(tmp_path):
    status, written = audit_json(tmp_path, data=write(tmp_path, pairs([1], chosen=" ")))
    assert status == 2
    assert set(kinds(written["data"])) == {"unusable", "dropped"}


def test_lines_that_hold_no_record_are_named_among_the_broken_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(record) for record in pairs(range(5))]
    path.write_bytes("\n".join([lines[0], "{oops", *lines[1:4], '["é"]', lines[4]]).encode("latin-1"))
    status, written = audit_json(tmp_path, data=str(path))
    assert status == 2
    result = written["data"]
    assert (result["records"], result["used"]) == (7, 5)
    assert set(kinds(result)) == {"broken"}
    first, second = kinds(result)["broken"]
    assert first.startswith(f"{path}, line 2: bad JSON") and second.startswith(f"{path}, line 6: byte 0xe9")


def test_a_source_that_cannot_be_read_on_is_an_error_behind_what_was_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(pairs(range(5)))[:-1] + ", {oops}, {}]")
    status, written = audit_json(tmp_path, data=str(path))
    assert status == 2
    assert written["data"]["used"] == 5
    (message,) = kinds(written["data"])["unreadable"]
    assert message.startswith(f"{path}, row 5: bad JSON")


def test_fields_that_are_not_read_are_named_for_each_source(tmp_path):
    records = [*pairs(range(3), question="Q", id=7), *pairs([4], notes=None, **{f"n{i}": i for i in range(30)})]
    data = write(tmp_path, records)
    second = write(tmp_path, pairs(range(5, 9)), "b.jsonl")
    status, written = audit_json(tmp_path, data=f"{data},{second}", strict=True)
    assert status == 0
    (note,) = kinds(written["data"])["unread_field"]
    assert note.startswith(f"{data}: 'question' in 3, 'id' in 3, 'n0' in 1, ")
    assert note.endswith("'n17' in 1, '…' in 12")


def test_an_implicit_prompt_that_is_not_found_is_a_warning(tmp_path, model):
    numbers = range(30)
    texts = [{"chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in numbers[:1]]
    texts += [{"chosen": f"Is {n} fine? Yes {n}.", "rejected": f"Is {n} fine? No {n}."} for n in numbers]
    data = write(tmp_path, texts)
    for options in ({}, {"model": model}):
        status, written = audit_json(tmp_path, data=data, **options)
        assert status == 0
        assert kinds(written["data"])["no_shared_prompt"] == [f"{data}, line 1"]
    empty = write(tmp_path, pairs([1], prompt=""), "b.jsonl")
    assert "no_shared_prompt" not in kinds(audit_json(tmp_path, data=empty)[1]["data"])


def test_a_missing_source_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"missing\.jsonl"):
        run_audit(AuditConfig(data=str(tmp_path / "missing.jsonl")))


def test_several_sources_of_different_formats(tmp_path):
    first = write(tmp_path, pairs(range(5)))
    second = write(tmp_path, [{"prompt": "Is 3 fine?", "completions": [" yes 3.", " no 3."]}], "b.jsonl")
    status, written = audit_json(tmp_path, data=f"{first},{second}")
    assert status == 0
    assert written["data"]["formats"] == {first: "pairs", second: "ranked"}
    assert kinds(written["data"]) == {"duplicate": [f"{second}, line 1: see {first}, line 4"]}


def test_held_out_data_is_compared_with_training_data(tmp_path):
    train, held_out = write(tmp_path, pairs(range(9))), write(tmp_path, pairs([4, 20]), "b.jsonl")
    status, written = audit_json(tmp_path, data=train, eval_data=held_out, strict=True)
    assert status == 1
    assert kinds(written["data"]) == {}
    assert kinds(written["eval_data"]) == {"held_out_record": [f"{held_out}, line 1: see {train}, line 5"]}


def test_messages_without_a_model_are_counted_as_lines_of_text(tmp_path):
    ask, say = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}
    other = {"role": "assistant", "content": "It is 5."}
    status, written = audit_json(
        tmp_path, data=write(tmp_path, [{"prompt": [ask], "chosen": [say], "rejected": [other]}])
    )
    assert status == 0
    assert written["data"]["lengths"]["chosen"]["mean"] == 4  # assistant: It is 4.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model") / "model"))


def test_a_model_adds_tokens_truncation_and_the_boundary(tmp_path, model):
    records = [*pairs(range(3)), *pairs([4], prompt="t", chosen="he", rejected="no"), *pairs([5], prompt="long " * 20)]
    data = write(tmp_path, [*records, *pairs([6], chosen="<eos>")])
    status, written = audit_json(tmp_path, data=data, model=model, max_length=40)
    assert status == 0
    result = written["data"]
    assert (result["records"], result["used"], result["unit"]) == (6, 5, "tokens")
    found = kinds(result)
    assert set(found) == {"dropped", "boundary", "truncated_prompt", "prompt_ends_in_space"}
    assert found["boundary"] == [f"{data}, line 4"]
    assert found["truncated_prompt"] == [f"{data}, line 5"]
    assert found["dropped"] == [f"{data}, line 6"]
    assert result["lengths"]["prompt"]["quantiles"]["0"] == 1


def test_messages_for_a_model_without_a_template_are_errors(tmp_path, model):
    ask, say = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is 4."}
    status, written = audit_json(tmp_path, data=write(tmp_path, [{"messages": [ask, say]}]), model=model)
    assert status == 2
    assert "no chat template" in kinds(written["data"])["broken"][0]


def test_a_length_needs_a_model():
    with pytest.raises(InputError, match=r"--max-length 64 without --model; allowed: both, or neither"):
        AuditConfig(data="a.jsonl", max_length=64)


@pytest.mark.parametrize("flag", ["json", "plot"])
def test_where_nothing_can_be_written_is_said_before_reading(tmp_path, flag):
    for name in (str(tmp_path), str(tmp_path / "missing" / "file")):
        with pytest.raises(InputError, match=f"--{flag} {name} is no file in a directory"):
            run_audit(AuditConfig(data="missing.jsonl", **{flag: name}))


def test_a_file_that_must_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    (tmp_path / "a.jsonl").write_bytes(json.dumps(pairs([1])[0]).encode())
    with pytest.raises(RunStopped, match=r"audit\.json cannot be written: Permission denied"):
        run_audit(AuditConfig(data=str(tmp_path / "a.jsonl"), json=str(tmp_path / "audit.json")))


# The picture.


def test_the_picture_shows_every_histogram(tmp_path, monkeypatch, capsys):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    data, held_out = write(tmp_path, pairs(range(30))), write(tmp_path, pairs(range(50, 55)), "b.jsonl")
    run_audit(AuditConfig(data=data, eval_data=held_out, plot=str(tmp_path / "lengths")))
    assert (tmp_path / "lengths").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert [part.get_suptitle() for part in figure.subfigs] == [data, held_out]
    for part, count in zip(figure.subfigs, (30, 5), strict=True):
        assert [axes.get_title() for axes in part.axes] == [
            "prompt (words)",
            "completion (words)",
            "chosen - rejected (words)",
        ]
        drawn = [sum(patch.get_data().values) for axes in part.axes for patch in axes.patches if not patch.get_fill()]
        assert drawn == [count] * 4


def test_a_picture_of_one_side_has_an_empty_panel(tmp_path):
    audit = Audit()
    audit.see(Preference("a b c", (" d e",), Origin("a.jsonl", 1)), None)
    save_lengths({"a.jsonl": audit.result()["lengths"]}, tmp_path / "lengths.png", unit="words")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
