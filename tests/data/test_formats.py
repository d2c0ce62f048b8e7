import pytest

from jaxdpo.data.formats import FORMATS, Unusable, describe_dropped, detect_format, preference_of
from jaxdpo.types import InputError, Preference

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
HH = {"chosen": TURNS + " See you!", "rejected": TURNS + " Go."}
RECORDS = {"pairs": PAIR, "hh": HH}


def preference(record, name):
    return preference_of(record, FORMATS[name], source="data.jsonl", line=3)


def test_every_format_has_a_record_here():
    assert RECORDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_detected_and_extra_fields_are_ignored(name):
    record = {**RECORDS[name], "id": 7, "notes": None}
    assert detect_format(record) == name
    assert preference(record, name) == preference(RECORDS[name], name)


def test_pairs():
    assert preference(PAIR, "pairs") == Preference("Q:", (" yes", " no"), "data.jsonl", 3)


def test_an_empty_prompt_is_legal():
    assert preference({**PAIR, "prompt": ""}, "pairs").prompt == ""


def test_hh_splits_at_the_last_turn_and_keeps_the_leading_space():
    assert preference(HH, "hh") == Preference(TURNS, (" See you!", " Go."), "data.jsonl", 3)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (None, "is null; allowed: a string"),
        (3, "is a number"),
        (True, "is a boolean"),
        ([{"role": "user"}], "is a list"),
        ({}, "is an object"),
        ("", "is ''; allowed: a string that is not empty"),
        ("\n\nAssistant: half \ud83d of it", r"holds '\\ud83d', half of a surrogate pair, at character 18"),
    ],
)
def test_bad_field_is_an_error_that_names_file_row_and_field(name, value, complaint):
    with pytest.raises(InputError, match=rf"^data\.jsonl, line 3: field 'rejected' {complaint}"):
        preference({**RECORDS[name], "rejected": value}, name)


@pytest.mark.parametrize("name", FORMATS)
def test_missing_field_is_an_error_that_names_what_is_there(name):
    record = {key: value for key, value in RECORDS[name].items() if key != "chosen"}
    with pytest.raises(
        InputError, match=r"^data\.jsonl, line 3: field 'chosen' is missing; got the fields \[.*'rejected'\]"
    ):
        preference(record, name)


def test_prompt_of_pairs_must_be_text():
    with pytest.raises(InputError, match="field 'prompt' is a list"):
        preference({**PAIR, "prompt": ["Q:"]}, "pairs")


def test_transcript_without_assistant_is_an_error():
    with pytest.raises(InputError, match=r"line 3: field 'chosen' holds no '\\n\\nAssistant:'"):
        preference({**HH, "chosen": "\n\nHuman: Hi"}, "hh")


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("pairs", {"rejected": " yes"}, "two completions are equal"),
        ("pairs", {"rejected": " \n"}, "a completion is empty"),
        ("hh", {"rejected": HH["chosen"]}, "two completions are equal"),
        ("hh", {"rejected": TURNS}, "a completion is empty"),
        ("hh", {"chosen": TURNS + " "}, "a completion is empty"),
        ("hh", {"rejected": "\n\nHuman: Other\n\nAssistant: Go."}, "chosen and rejected have different prompts"),
    ],
)
def test_unusable_record_is_told_from_a_bad_one(name, change, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        preference({**RECORDS[name], **change}, name)


@pytest.mark.parametrize("record", [{}, {"text": "a"}, {"chosen": "a", "rejected": "b"}, {"chosen": 1, "rejected": 2}])
def test_no_format_fits(record):
    with pytest.raises(InputError, match=r"no format fits") as error:
        detect_format(record)
    assert str(sorted(record)) in str(error.value)
    assert all(repr(name) in str(error.value) for name in FORMATS)


def test_describe_nothing_dropped():
    assert describe_dropped([]) == "dropped 0"
