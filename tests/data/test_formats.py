import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxdpo.data.chat import plain
from jaxdpo.data.formats import FORMATS, PROMPT_NAMES, READS, Unusable, detect_format, implicit, preference_of
from jaxdpo.types import UNRANKED, InputError, Origin, Preference

PAIR = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
HH = {"chosen": TURNS + " See you!", "rejected": TURNS + " Go."}
IMPLICIT = {"chosen": "Q: yes", "rejected": "Q: no"}
RANKED = {"prompt": "Q:", "completions": [" yes", " so so", " no"]}
UNPAIRED = {"prompt": "Q:", "completion": " no", "label": False}
COMPLETION = {"prompt": "Q:", "completion": " yes"}
MESSAGES = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}]}
RECORDS = {
    "pairs": PAIR,
    "implicit": IMPLICIT,
    "hh": HH,
    "ranked": RANKED,
    "unpaired": UNPAIRED,
    "completion": COMPLETION,
    "text": {"text": "Q: yes"},
    "messages": MESSAGES,
}
TEXT = {
    "pairs": "rejected",
    "implicit": "rejected",
    "hh": "rejected",
    "unpaired": "completion",
    "completion": "completion",
    "text": "text",
}
"""Of each format a field that holds one text."""
COMPARED = ["pairs", "implicit", "hh"]


def preference(record, name):
    return preference_of(record, FORMATS[name], Origin("data.jsonl", 3), plain)


def test_every_format_has_a_record_here():
    assert RECORDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_detected_and_extra_fields_are_ignored(name):
    record = {**RECORDS[name], "id": 7, "notes": None, "label": RECORDS[name].get("label"), "scores": None}
    assert detect_format(record) == name
    assert preference(record, name) == preference(RECORDS[name], name)


def test_pairs():
    assert preference(PAIR, "pairs") == Preference("Q:", (" yes", " no"), Origin("data.jsonl", 3))


def test_an_empty_prompt_is_legal():
    assert preference({**PAIR, "prompt": ""}, "pairs").prompt == ""


def test_hh_splits_at_the_last_turn_and_keeps_the_leading_space():
    assert preference(HH, "hh") == Preference(TURNS, (" See you!", " Go."), Origin("data.jsonl", 3))


def test_ranked_stands_best_first():
    assert preference(RANKED, "ranked") == Preference("Q:", (" yes", " so so", " no"), Origin("data.jsonl", 3))


@pytest.mark.parametrize(
    ("field", "values", "order", "ranks"),
    [
        ("ranks", [3, 1, 2], "bca", None),
        ("ranks", [0, 1, 2, 3], "abcd", None),
        ("ranks", [-7, 10**30, 5], "acb", None),
        ("ranks", [2, 1, 1], "bca", (0, 0, 1)),
        ("ranks", [5, 9, 5, 9, 7], "acebd", (0, 0, 1, 2, 2)),
        ("ranks", [None, 1, None], "bac", (0, UNRANKED, UNRANKED)),
        ("ranks", [None, 2, 1, None], "cbad", (0, 1, UNRANKED, UNRANKED)),
        ("ranks", [4, None, 4], "acb", (0, 0, UNRANKED)),
        ("ranks", [1, None], "ab", (0, UNRANKED)),
        ("scores", [1, 3.5, -2], "bac", None),
        ("scores", [0.5, 1, 1.0], "bca", (0, 0, 1)),
        ("scores", [-0.0, 0, -1e-9], "abc", (0, 0, 1)),
        ("scores", [1e308, 10**400], "ba", None),
    ],
)
def test_ranked_in_any_order_becomes_best_first(field, values, order, ranks):
    texts = dict(zip("abcde", (" A", " B", " C", " D", " E"), strict=True))
    record = {"prompt": "Q:", "completions": list(texts.values())[: len(values)], field: values}
    assert preference(record, "ranked") == Preference(
        "Q:", tuple(texts[i] for i in order), Origin("data.jsonl", 3), ranks
    )


@pytest.mark.parametrize("label", [True, False])
def test_unpaired(label):
    assert preference({**UNPAIRED, "label": label}, "unpaired") == Preference(
        "Q:", (" no",), Origin("data.jsonl", 3), label=label
    )


@pytest.mark.parametrize("name", TEXT)
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
    with pytest.raises(InputError, match=rf"^data\.jsonl, line 3: field '{TEXT[name]}' {complaint}"):
        preference({**RECORDS[name], TEXT[name]: value}, name)
    if name == "pairs":
        with pytest.raises(InputError, match=rf"^data\.jsonl, line 3: field 'completions\[1\]' {complaint}"):
            preference({**RANKED, "completions": [" yes", value]}, "ranked")


@pytest.mark.parametrize(
    ("name", "field"), [(name, field) for name, record in RECORDS.items() if name != "messages" for field in record]
)
def test_missing_field_is_an_error_that_names_what_is_there(name, field):
    record = {key: value for key, value in RECORDS[name].items() if key != field}
    with pytest.raises(InputError) as error:
        preference(record, name)
    message = f"data.jsonl, line 3: field {field!r} is missing; got the fields {sorted(record)}; allowed: "
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["pairs", "ranked", "unpaired", "completion"])
def test_prompt_must_be_text(name):
    with pytest.raises(InputError, match=r"^data\.jsonl, line 3: field 'prompt' is a list"):
        preference({**RECORDS[name], "prompt": ["Q:"]}, name)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"completions": " yes"}, "field 'completions' is a string; allowed: a list of 2 strings or more; "),
        ({"completions": None}, "field 'completions' is null; allowed: a list of 2 strings or more; "),
        ({"completions": []}, "field 'completions' has 0 entries; allowed: a list of 2 strings or more; "),
        ({"completions": [" yes"]}, "field 'completions' has 1 entries; allowed: a list of 2 strings or more; "),
        ({"ranks": 1}, "field 'ranks' is 1; allowed: a list of 3 numbers, one for each completion; "),
        ({"ranks": [1, 2]}, "field 'ranks' has 2 entries for 3 completions; allowed: one for each; "),
        ({"ranks": [1, 2, 3, 4]}, "field 'ranks' has 4 entries for 3 completions; allowed: one for each; "),
        ({"ranks": [1, 2.5, 3]}, "field 'ranks[1]' is 2.5; allowed: a whole number, lower is better, or null: "),
        ({"ranks": [1, 2, 3.0]}, "field 'ranks[2]' is 3.0; allowed: a whole number"),
        ({"ranks": ["1", 2, 3]}, "field 'ranks[0]' is a string; allowed: a whole number"),
        ({"ranks": [1, True, 3]}, "field 'ranks[1]' is a boolean; allowed: a whole number"),
        ({"scores": {}}, "field 'scores' is an object; allowed: a list of 3 numbers, one for each completion; "),
        ({"scores": [1]}, "field 'scores' has 1 entries for 3 completions; allowed: one for each; "),
        ({"scores": [1, None, 0]}, "field 'scores[1]' is null; allowed: a finite number, higher is better; "),
        ({"scores": [1, 0, math.nan]}, "field 'scores[2]' is nan; allowed: a finite number"),
        ({"scores": [-math.inf, 0, 1]}, "field 'scores[0]' is -inf; allowed: a finite number"),
        ({"scores": [False, 0, 1]}, "field 'scores[0]' is a boolean; allowed: a finite number"),
        ({"ranks": [1, 2, 3], "scores": [3, 2, 1]}, "the record has both fields 'ranks' and 'scores'; allowed: one of"),
    ],
)
def test_ranked_says_what_it_cannot_read(change, complaint):
    with pytest.raises(InputError) as error:
        preference({**RANKED, **change}, "ranked")
    assert str(error.value).startswith(f"data.jsonl, line 3: {complaint}")


@pytest.mark.parametrize(("label", "shown"), [(1, "1"), (0.0, "0.0"), ("true", "a string"), (None, "null")])
def test_a_label_is_true_or_false(label, shown):
    with pytest.raises(InputError, match=rf"^data\.jsonl, line 3: field 'label' is {shown}; allowed: true or false"):
        preference({**UNPAIRED, "label": label}, "unpaired")


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
        ("ranked", {"completions": [" yes", " no", " yes"]}, "two completions are equal"),
        ("ranked", {"completions": [" yes", " ", " no"], "ranks": [1, 2, 2]}, "a completion is empty"),
        ("ranked", {"ranks": [4, 4, 4]}, "all completions tie"),
        ("ranked", {"scores": [0.5, 0.5, 0.5]}, "all completions tie"),
        ("ranked", {"ranks": [None, None, None]}, "no completion is ranked"),
        ("unpaired", {"completion": "\t"}, "a completion is empty"),
        ("completion", {"completion": "\u3000"}, "a completion is empty"),
        ("text", {"text": " "}, "a completion is empty"),
        ("implicit", {"chosen": "Q: yes", "rejected": "Q: yes"}, "two completions are equal"),
        ("implicit", {"chosen": " ", "rejected": "Q: no"}, "a completion is empty"),
        (
            "implicit",
            {"chosen": "User: Hi\nAssistant: Hello", "rejected": "User: Hey\nAssistant: Hello"},
            "chosen and rejected have different prompts",
        ),
    ],
)
def test_unusable_record_is_told_from_a_bad_one(name, change, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        preference({**RECORDS[name], **change}, name)


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"answer": "a"},
        {"chosen": "a"},
        {"prompt": "a", "chosen": "b"},
        {"prompt": "a", "chosen": "b", "rejected": None},
        {"completion": "b", "label": True},
        {"completions": ["a", "b"]},
    ],
)
def test_no_format_fits(record):
    with pytest.raises(InputError, match=r"^no format fits a record with the fields ") as error:
        detect_format(record)
    assert str(sorted(record)) in str(error.value)
    assert all(repr(name) in str(error.value) for name in FORMATS)
    assert str(error.value).endswith("; rename the fields to fit one")


ASK, SAY = MESSAGES["messages"]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY]},
        {"prompt": [ASK], "chosen": "yes", "rejected": "no"},
        {"prompt": "Q", "chosen": [ASK, SAY], "rejected": [ASK, SAY], "messages": [ASK, SAY]},
        {"chosen": [ASK, SAY], "rejected": [ASK, SAY]},
        {"prompt": [ASK], "completions": [[SAY], [SAY]]},
        {"prompt": [ASK], "completion": [SAY]},
        {"prompt": [ASK], "completion": [SAY], "label": True},
        {"messages": "no list"},
    ],
)
def test_fields_with_lists_of_objects_are_messages(record):
    assert detect_format(record) == "messages"


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (RANKED, "2 formats fit, 'pairs', 'ranked', "),
        (UNPAIRED, "2 formats fit, 'pairs', 'unpaired', "),
        (MESSAGES, "2 formats fit, 'messages', 'pairs', "),
        ({**RANKED, "text": "Q: yes"}, "3 formats fit, 'pairs', 'ranked', 'text', "),
    ],
)
def test_a_record_that_fits_several_formats_is_not_guessed_at(other, names):
    record = {**PAIR, **other}
    with pytest.raises(InputError, match=rf"^{names}a record with the fields .*; say which, in place of 'auto'$"):
        detect_format(record)
    assert preference(record, "pairs").completions == (" yes", " no")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({**IMPLICIT, "question": "Q:"}, "'question' may hold the prompt, which the format 'implicit' would leave out"),
        ({"system": "", "Question": "Q:", **IMPLICIT}, "'system' and 'Question' may hold the prompt, which the format"),
        ({**IMPLICIT, "conversations": [{"from": "human", "value": "Q"}]}, "'conversations' may hold the prompt, "),
        ({**HH, "instruction": "Q:"}, "'instruction' may hold the prompt, which the format 'hh' would leave out; got "),
        ({"text": "yes", "prompt": "Q:"}, "'prompt' may hold the prompt, which the format 'text' would leave out; got"),
    ],
)
def test_a_prompt_by_another_name_is_not_left_out(record, complaint):
    with pytest.raises(InputError) as error:
        detect_format(record)
    assert str(error.value).startswith(complaint)
    assert f"got the fields {sorted(record)}; allowed: the whole prompt in the field 'prompt', or none" in str(
        error.value
    )


@pytest.mark.parametrize("name", sorted(PROMPT_NAMES))
def test_the_message_about_a_prompt_says_how_to_go_on(name):
    with pytest.raises(InputError, match=r"; rename it to 'prompt', or give --format implicit$"):
        detect_format({**IMPLICIT, name.title(): "Q:"})
    with pytest.raises(InputError, match=r"; rename it to 'prompt' and 'text' to 'completion', or give --format text$"):
        detect_format({"text": "yes", name: "Q:"})


@pytest.mark.parametrize(
    "record",
    [
        {**IMPLICIT, "question": None, "question_id": "7", "user": 7},
        {**IMPLICIT, "system": {"name": "x"}},
    ],
)
def test_fields_that_hold_no_text_are_no_prompts(record):
    assert detect_format(record) == "implicit"


GPT = {"from": "gpt", "value": "4"}


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"conversations": [{"from": "human", "value": "2+2?"}], "chosen": GPT, "rejected": GPT}, "chosen"),
        ({"conversations": [{"from": "human", "value": "2+2?"}, GPT]}, "conversations"),
        ({"prompt": "2+2?", "chosen": [GPT], "rejected": [GPT]}, "chosen"),
        ({"messages": [GPT]}, "messages"),
    ],
)
def test_sharegpt_is_told_how_to_write_messages(record, field):
    complaint = rf"field '{field}' holds 'from' and 'value', as ShareGPT and LLaMA-Factory do; .*rename \"from\" to"
    with pytest.raises(InputError, match=f"^{complaint}"):
        detect_format(record)
    if field == "chosen":
        for name in ("implicit", "pairs", "messages"):
            with pytest.raises(InputError, match=rf"^data\.jsonl, line 3: {complaint}"):
                preference({"prompt": [ASK] if name == "messages" else "Q:", **record}, name)


def test_other_fields_may_be_like_sharegpt():
    assert detect_format({**PAIR, "conversations": [GPT], "meta": GPT}) == "pairs"


def test_a_single_message_is_to_be_written_as_a_list():
    assert detect_format({"chosen": SAY, "rejected": SAY}) == "messages"


OPTIONAL = {
    "margin": 1.0,
    "scores": [1, 2, 3],
    "label": True,
    "tools": [],
    "chat_template_kwargs": {},
    "prompt": [{"role": "user", "content": "Q"}],
}


class Watched(dict):
    """A record that remembers which of its fields were asked for."""

    def __init__(self, record):
        super().__init__(record)
        self.seen = set()

    def __getitem__(self, field):
        self.seen.add(field)
        return super().__getitem__(field)

    def get(self, field, default=None):
        self.seen.add(field)
        return super().get(field, default)


@pytest.mark.parametrize("name", FORMATS)
def test_the_fields_that_a_format_reads_are_those_of_the_table(name):
    say = [MESSAGES["messages"][1]]
    layouts = {
        "messages": [
            MESSAGES,
            {"chosen": say, "rejected": say},
            {"completions": [say] * 3},
            {"completions": [say] * 3, "scores": None, "ranks": [1, 2, 3]},
            {"completion": say},
        ],
        "ranked": [RANKED, {**RANKED, "scores": None, "ranks": [1, 2, 3]}],
    }
    seen = set()
    for layout in layouts.get(name, [RECORDS[name]]):
        record = Watched({"id": 7, **OPTIONAL, **layout})
        FORMATS[name](record)
        seen |= record.seen
    assert seen == READS[name]


@pytest.mark.parametrize(("margin", "value"), [(2, 2.0), (-0.5, -0.5), (0, 0.0), (None, None)])
@pytest.mark.parametrize("name", COMPARED)
def test_margin(name, margin, value):
    assert preference({**RECORDS[name], "margin": margin}, name).margin == value


@pytest.mark.parametrize(
    ("margin", "complaint"),
    [
        ("1", "a string; allowed: a finite number, or null: not stated"),
        (True, "a boolean; allowed: a finite number"),
        (math.nan, "nan; allowed: a finite number"),
        (math.inf, "inf; allowed: a finite number"),
        (10**400, r"a whole number of 401 digits; allowed: a number from -3.4e\+38 to 3.4e\+38"),
        (-1e39, r"-1e\+39; allowed: a number from -3.4e\+38 to 3.4e\+38, as float32 holds it"),
    ],
)
@pytest.mark.parametrize("name", COMPARED)
def test_a_margin_is_a_finite_number(name, margin, complaint):
    with pytest.raises(InputError, match=rf"^data\.jsonl, line 3: field 'margin' is {complaint}"):
        preference({**RECORDS[name], "margin": margin}, name)


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_a_field_that_is_null_says_nothing(record):
    nulls = dict.fromkeys(["prompt", "chosen", "rejected", "completions", "completion", "label", "text", "messages"])
    assert detect_format({**nulls, **record}) == detect_format(record)


CHATML = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        pytest.param("The sky is", " blue.", " black.", id="not inside a word"),
        pytest.param("The sky", " is", " isn't", id="nor inside the word of one"),
        pytest.param("The sky is", " blue", " green", id="the space belongs to the completion"),
        pytest.param("The sky is", "  blue", "  green", id="all of them"),
        pytest.param("The sky is", "\tblue", " green", id="whatever they are"),
        pytest.param("2+2?\n", "Four", "Five", id="the newline belongs to the prompt"),
        pytest.param("2+2?\r\n\r\n", "Four", "Five", id="however many"),
        pytest.param("2+2?\n", "  Four", "  Five", id="not the indentation behind it"),
        pytest.param("The sky is\n", "\nblue", "black", id="lines end early"),
        pytest.param("The sky is", " blue", " blue today", id="one begins like the other"),
        pytest.param("The sky is", " blue", " blue\n", id="white space alone is no completion"),
        pytest.param("", "blue", "green", id="nothing shared"),
        pytest.param("", "blue", "blueish", id="one word"),
        pytest.param("", "天空是蓝色的", "天空是绿色的", id="no white space"),
        pytest.param("השמיים", " כחולים", " ירוקים", id="right to left"),
        pytest.param("Look:", " 🙂🙂", " 🙂🙃", id="emoji"),
        pytest.param("Human: Hi\n\nAssistant:", " Hello you", " Hello there", id="behind the marker"),
        pytest.param("User: Hi\nAssistant:", "\nHello you", "\nHello there", id="the marker keeps nothing"),
        pytest.param(CHATML, "Hello you", "Hello there", id="a template's marker"),
        pytest.param(
            f"{TURNS}", " Bye.\n\nHuman: So?\n\nAssistant: A", " By.\n\nHuman: So?\n\nAssistant: B", id="turns"
        ),
        pytest.param("The Assistant: of", " two", " one", id="no marker inside a line"),
    ],
)
def test_where_an_implicit_prompt_ends(prompt, chosen, rejected):
    assert preference({"chosen": prompt + chosen, "rejected": prompt + rejected}, "implicit") == Preference(
        prompt, (chosen, rejected), Origin("data.jsonl", 3)
    )


@given(st.text("ab \n🙂", max_size=12), st.text("ab \n🙂", max_size=6), st.text("ab \n🙂", max_size=6))
def test_an_implicit_prompt_loses_nothing_and_cuts_no_word(start, end, other):
    record = {"chosen": start + end + "a", "rejected": start + other + "b"}
    prompt, completions = implicit(record)[:2]
    assert [prompt + completion for completion in completions] == list(record.values())
    for completion in completions:
        assert completion.strip()
        assert not prompt or prompt[-1] == "\n" or (completion[0].isspace() and not prompt[-1].isspace())
