import json

import pytest

from jaxdpo.data.chat import plain
from jaxdpo.data.formats import Unusable, messages, preference_of
from jaxdpo.types import UNRANKED, InputError, Origin

ORIGIN = Origin("chats.jsonl", 3)
SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
AGAIN = {"role": "user", "content": "Sure?"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]}
RESULT = {"role": "tool", "name": "add", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add"}}]
EXPLICIT = {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}
IMPLICIT = {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}
RANKED = {"prompt": [ASK], "completions": [[FIVE], [FOUR]]}
SINGLE = {"prompt": [ASK], "completion": [FOUR]}


def preference(record):
    return preference_of(record, messages, ORIGIN, plain)


@pytest.mark.parametrize(
    ("record", "prompt", "completions"),
    [
        (EXPLICIT, [ASK], ([FOUR], [FIVE])),
        ({**EXPLICIT, "prompt": [SYSTEM, ASK, FOUR, AGAIN]}, [SYSTEM, ASK, FOUR, AGAIN], ([FOUR], [FIVE])),
        ({**EXPLICIT, "chosen": [FOUR, AGAIN, FOUR]}, [ASK], ([FOUR, AGAIN, FOUR], [FIVE])),
        (IMPLICIT, [ASK], ([FOUR], [FIVE])),
        ({**IMPLICIT, "prompt": None}, [ASK], ([FOUR], [FIVE])),
        ({**IMPLICIT, "prompt": " 2+2?\n", "messages": [ASK, FOUR]}, [ASK], ([FOUR], [FIVE])),
        (
            {"chosen": [SYSTEM, ASK, FOUR, AGAIN, FOUR], "rejected": [SYSTEM, ASK, FOUR, AGAIN, FIVE]},
            [SYSTEM, ASK, FOUR, AGAIN],
            ([FOUR], [FIVE]),
        ),
        ({"chosen": [ASK, FOUR], "rejected": [ASK, FOUR, AGAIN, FIVE]}, [ASK], ([FOUR], [FOUR, AGAIN, FIVE])),
        (RANKED, [ASK], ([FIVE], [FOUR])),
        ({**RANKED, "ranks": [2, 1]}, [ASK], ([FOUR], [FIVE])),
        (SINGLE, [ASK], ([FOUR],)),
        ({"messages": [SYSTEM, ASK, FOUR, AGAIN, FIVE]}, [SYSTEM, ASK, FOUR, AGAIN], ([FIVE],)),
    ],
)
def test_layouts(record, prompt, completions):
    content = messages(record)
    assert (content.prompt, content.completions) == (prompt, completions)
    assert content[2:] == (None,) * 5


def test_what_is_stated_beside_the_messages():
    assert messages({**EXPLICIT, "margin": 2}).margin == 2.0
    assert messages({**IMPLICIT, "margin": 0.5}).margin == 0.5
    assert messages({**SINGLE, "label": False}).label is False
    assert messages({**RANKED, "ranks": [None, 1]}).ranks == (0, UNRANKED)
    several = {**RANKED, "completions": [[FIVE], [FOUR], [CALL, RESULT, FOUR]]}
    assert messages({**several, "ranks": [2, 1, 1]}).ranks == (0, 0, 1)
    assert messages({**several, "scores": [1, 2, 0]}).completions == (
        [FOUR],
        [FIVE],
        [{**CALL, "content": None}, RESULT, FOUR],
    )


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["a list", "JSON text"])
def test_tools_and_variables_go_along(tools):
    kwargs = {"enable_thinking": False, "date": None}
    content = messages({**EXPLICIT, "tools": tools, "chat_template_kwargs": kwargs})
    assert content.tools == TOOLS
    assert content.chat_template_kwargs == {"enable_thinking": False}
    assert messages({**EXPLICIT, "tools": [], "chat_template_kwargs": {}}) == messages(EXPLICIT)


def test_tool_calls_and_results():
    content = messages({**EXPLICIT, "chosen": [CALL, RESULT, FOUR]})
    assert content.completions[0] == [{**CALL, "content": None}, RESULT, FOUR]
    assert messages({**EXPLICIT, "chosen": [CALL]}).completions[0] == [{**CALL, "content": None}]


def test_null_is_absent_at_any_depth():
    padded = {"role": "user", "content": "2+2?", "tool_calls": None}
    call = {"function": {"name": "add", "arguments": {"a": 2, "b": 2, "unit": None}}, "id": None}
    content = messages({**EXPLICIT, "prompt": [padded], "chosen": [{**FOUR, "tool_calls": [call]}]})
    assert content.prompt == [ASK]
    assert content.completions[0] == [{**FOUR, "tool_calls": CALL["tool_calls"]}]
    # What is JSON text holds nothing but what was written.
    schema = [{"function": {"name": "add", "default": None}}]
    assert messages({**EXPLICIT, "tools": json.dumps(schema)}).tools == schema


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?", "index": None}]
    assert messages({**EXPLICIT, "prompt": [{"role": "user", "content": parts}]}) == messages(EXPLICIT)


def test_the_record_is_left_as_it_was():
    record = {**EXPLICIT, "prompt": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}], "name": None}]}
    before = json.dumps(record)
    messages(record)
    assert json.dumps(record) == before


def nested(depth):
    return {**ASK, "extra": [] if depth == 0 else nested(depth - 1)}


def test_a_message_may_be_nested():
    assert messages({**EXPLICIT, "prompt": [nested(63)]}).prompt == [nested(63)]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": [ASK]}, "no conversation in the fields ['prompt']; allowed: "),
        ({**EXPLICIT, "rejected": None}, "field 'rejected' is null; allowed: a list of messages"),
        ({"prompt": [ASK], "chosen": [FOUR]}, "field 'rejected' is missing; got the fields ['chosen', 'prompt']; "),
        ({**EXPLICIT, "chosen": "4"}, "field 'chosen' is a string; allowed: a list of messages"),
        ({**EXPLICIT, "chosen": []}, "field 'chosen' is an empty list; allowed: a list of messages"),
        ({**EXPLICIT, "prompt": []}, "field 'prompt' is an empty list; allowed: a list of messages"),
        ({**SINGLE, "prompt": "2+2?"}, "field 'prompt' is a string; allowed: a list of messages"),
        ({**EXPLICIT, "chosen": ["4"]}, "field 'chosen[0]' is a string; allowed: a message"),
        ({**EXPLICIT, "prompt": [ASK, None]}, "field 'prompt[1]' is null; allowed: a message"),
        ({**EXPLICIT, "prompt": [{"from": "human", "value": "2+2?"}]}, "field 'prompt' holds 'from' and 'value', "),
        ({**EXPLICIT, "prompt": [ASK, {"from": "gpt", "value": "4"}]}, "field 'prompt[1]' holds 'from' and 'value', "),
        ({**EXPLICIT, "chosen": {"from": "gpt", "value": "4"}}, "field 'chosen' holds 'from' and 'value', "),
        ({**EXPLICIT, "chosen": FOUR}, "field 'chosen' is an object; allowed: a list of messages"),
        ({**EXPLICIT, "prompt": [{**ASK, "role": None}]}, "field 'prompt[0].role' is missing; "),
        ({**EXPLICIT, "prompt": [{**ASK, "role": ""}]}, "field 'prompt[0].role' is ''; allowed: "),
        ({**EXPLICIT, "prompt": [{**ASK, "role": 1}]}, "field 'prompt[0].role' is a number; allowed: "),
        ({**EXPLICIT, "prompt": [{"role": "user"}]}, "field 'prompt[0].content' is missing; got the fields ['role']"),
        ({**EXPLICIT, "prompt": [{**ASK, "content": 4}]}, "field 'prompt[0].content' is a number; allowed: a string"),
        ({**EXPLICIT, "prompt": [{**ASK, "content": ["4"]}]}, "field 'prompt[0].content[0]' is a string; allowed: {"),
        (
            {**EXPLICIT, "prompt": [{**ASK, "content": [{"type": "image", "url": "x"}]}]},
            "field 'prompt[0].content[0]' is of type 'image'; allowed: {",
        ),
        (
            {**EXPLICIT, "prompt": [{**ASK, "content": [{"type": "text"}]}]},
            "field 'prompt[0].content[0].text' is missing; ",
        ),
        (
            {**EXPLICIT, "prompt": [{**ASK, "content": "\ud83d"}]},
            "field 'prompt[0].content' holds '\\ud83d', half of a surrogate pair, at character 0; ",
        ),
        (
            {**EXPLICIT, "prompt": [nested(64)]},
            f"field 'prompt[0]{'.extra' * 64}.role' is nested deeper than 64; allowed: ",
        ),
        ({**EXPLICIT, "chosen": [ASK, FOUR]}, "field 'chosen' begins with a message of role 'user'; allowed: "),
        ({**EXPLICIT, "rejected": [FIVE, AGAIN]}, "field 'rejected' ends with a message of role 'user'; allowed: "),
        ({**IMPLICIT, "rejected": [ASK, FIVE, AGAIN]}, "field 'rejected' ends with a message of role 'user'; "),
        ({**RANKED, "completions": [[FIVE]]}, "field 'completions' has 1 entries; allowed: a list of 2 lists of"),
        ({**RANKED, "completions": [[FIVE], [ASK]]}, "field 'completions[1]' begins with a message of role 'user'"),
        ({**RANKED, "completions": [[FIVE], FOUR]}, "field 'completions[1]' is an object; allowed: a list of messages"),
        ({**RANKED, "ranks": [1]}, "field 'ranks' has 1 entries for 2 completions; "),
        ({**SINGLE, "label": 1}, "field 'label' is 1; allowed: true or false; "),
        ({**EXPLICIT, "margin": "big"}, "field 'margin' is a string; allowed: a finite number"),
        ({**IMPLICIT, "prompt": "3+3?"}, "field 'prompt' is a string that no message shared by 'chosen' and "),
        ({**EXPLICIT, "tools": "add"}, "field 'tools' is no JSON (Expecting value"),
        ({**EXPLICIT, "tools": "[" * 9999}, "field 'tools' is no JSON ("),
        ({**EXPLICIT, "tools": "{}"}, "field 'tools' is an object; allowed: a list of JSON schemas"),
        ({**EXPLICIT, "tools": [TOOLS[0], "add"]}, "field 'tools[1]' is a string; allowed: the JSON schema"),
        ({**EXPLICIT, "chat_template_kwargs": True}, "field 'chat_template_kwargs' is a boolean; allowed: an object"),
    ],
)
def test_an_error_names_the_path_of_what_is_wrong(record, complaint):
    with pytest.raises(InputError) as error:
        preference(record)
    assert str(error.value).startswith(f"chats.jsonl, line 3: {complaint}")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": [ASK, FOUR], "rejected": [AGAIN, FIVE]}, "chosen and rejected have different prompts"),
        (
            {"chosen": [ASK, FOUR, ASK, FOUR], "rejected": [ASK, FOUR, AGAIN, FOUR]},
            "chosen and rejected have different",
        ),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "chosen and rejected share no message"),
        ({"messages": [ASK, FOUR, AGAIN]}, "the last message is of role 'user', not 'assistant'"),
        ({"messages": [FOUR]}, "nothing is said before the assistant's message"),
        ({**EXPLICIT, "rejected": [FOUR]}, "two completions are equal"),
        (IMPLICIT | {"rejected": [ASK, FOUR]}, "two completions are equal"),
        ({**EXPLICIT, "rejected": [{"role": "assistant", "content": " "}]}, "a completion is empty"),
        ({"messages": [ASK, {"role": "assistant", "content": ""}]}, "a completion is empty"),
        ({**RANKED, "scores": [1, 1]}, "all completions tie"),
    ],
)
def test_a_conversation_that_states_nothing_is_dropped(record, reason):
    with pytest.raises(Unusable, match=f"^{reason}"):
        preference(record)


def test_messages_need_something_that_renders_them():
    with pytest.raises(
        InputError, match=r"^chats\.jsonl, line 3: the record holds messages, and there is no chat templ"
    ):
        preference_of(EXPLICIT, messages, ORIGIN)
