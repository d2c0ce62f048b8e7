"""TRL's own tokenisation of the same records gives the same ids; where it does not, the difference is intended."""

import json

import pytest

from jaxdpo.data.chat import Renderer
from jaxdpo.data.formats import FORMATS, detect_format, preference_of
from jaxdpo.data.tokenize import tokenize_preference
from jaxdpo.types import Origin
from tests.data.make_golden_ids import DIFFERENT, IDS, RECORDS
from tests.data.toy_tokenizers import smollm2

GOLDEN = json.loads(IDS.read_text(encoding="utf-8"))
SAME = [case for case in GOLDEN if "differs" not in case]
OTHER = {case["differs"]: case for case in GOLDEN if "differs" in case}
TOKENIZER = smollm2()


def our_ids(name, record):
    """`[prompt, *completions]`, as lists."""
    preference = preference_of(record, FORMATS[name], Origin("golden.jsonl", 1), Renderer(TOKENIZER))
    group = tokenize_preference(preference, TOKENIZER, 4096)
    return [ids.tolist() for ids in (group.prompt, *group.completions)]


def trl_ids(case):
    names = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
    return [case[name] for name in names if name in case]


def test_the_golden_ids_are_those_of_the_records():
    records = [(name, record) for name, records in RECORDS.items() for record in records]
    assert [(case["format"], case["record"]) for case in SAME] == records
    assert {why: (case["format"], case["record"]) for why, case in OTHER.items()} == DIFFERENT


@pytest.mark.parametrize("case", SAME, ids=lambda case: case["format"])
def test_same_ids_as_trl(case):
    expected = "hh" if "\n\nAssistant:" in case["record"].get("chosen", "") and "prompt" not in case["record"] else None
    assert detect_format(case["record"]) == (expected or case["format"])
    assert our_ids(case["format"], case["record"]) == trl_ids(case)
    if expected:
        assert our_ids(expected, case["record"]) == trl_ids(case)


@pytest.mark.parametrize(
    ("why", "theirs", "ours"),
    [
        ("a merge across the boundary", ["The", " sky", " skill"], ["The sk", "y", "ill"]),
        ("implicit inside a number", ["It is 1", "2", "3"], ["It is", " 12", " 13"]),
        ("implicit in the assistant's turn", ["Assistant: It's", " 4.", " 5."], ["Assistant:", " It's 4.", " It's 5."]),
    ],
)
def test_intended_difference_from_trl(why, theirs, ours):
    case = OTHER[why]
    for ids, (prompt_end, *completions) in ((trl_ids(case), theirs), (our_ids(case["format"], case["record"]), ours)):
        prompt, *rest = map(TOKENIZER.decode, ids)
        assert prompt.endswith(prompt_end)
        assert rest == [f"{completion}<|im_end|>" for completion in completions]
