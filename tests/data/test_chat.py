import pytest

from jaxdpo.data.chat import Renderer, plain
from jaxdpo.data.formats import FORMATS, preference_of
from jaxdpo.types import InputError, Origin, Preference
from tests.data.toy_tokenizers import smollm2, toy_tokenizer

ORIGIN = Origin("chats.jsonl", 3)
SYSTEM, ASK = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}
FOUR, FIVE = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
RESULT = {"role": "tool", "content": "4"}
PAIR = {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}

HEADERS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
GENERATION = "{% if add_generation_prompt %}[assistant]{% endif %}"
TOOLS = "{% if tools %}[tools]{{ tools | tojson }}[end]{% endif %}"
CALLS = HEADERS.replace("[end]", "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}[end]")


def tokenizer(template):
    made = toy_tokenizer()
    made.chat_template = template
    return made


def preference(record, template=HEADERS + GENERATION):
    return preference_of(record, FORMATS["messages"], ORIGIN, Renderer(tokenizer(template)))


def test_prompt_and_completions_are_what_the_template_writes():
    assert preference(PAIR) == Preference("[user]2+2?[end][assistant]", ("4[end]", "5[end]"), ORIGIN, templated=True)


def test_several_turns():
    made = preference(
        {"prompt": [SYSTEM, ASK, FOUR, ASK], "chosen": [CALL, RESULT, FOUR], "rejected": [FIVE]}, CALLS + GENERATION
    )
    assert made.prompt == "[system]Be brief.[end][user]2+2?[end][assistant]4[end][user]2+2?[end][assistant]"
    assert made.completions[1] == "5[end]"
    assert made.completions[0].endswith("[end][tool]4[end][assistant]4[end]") and '"add"' in made.completions[0]


def test_smollm2_announces_itself_where_no_system_message_does():
    tokenizer = smollm2()
    own, given = (
        preference_of({**PAIR, "prompt": prompt}, FORMATS["messages"], ORIGIN, Renderer(tokenizer)).prompt
        for prompt in ([ASK], [SYSTEM, ASK])
    )
    rest = "<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert own == "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face" + rest
    assert given == "<|im_start|>system\nBe brief." + rest


def test_tools_and_variables_reach_the_template():
    made = preference(
        {**PAIR, "tools": [{"name": "add"}], "chat_template_kwargs": {"mood": "kind"}},
        TOOLS + "({{ mood }})" + HEADERS + GENERATION,
    )
    assert made.prompt == '[tools][{"name": "add"}][end](kind)[user]2+2?[end][assistant]'


def test_what_is_stated_beside_the_messages_comes_through():
    record = {"prompt": [ASK], "completions": [[FIVE], [FOUR], [RESULT | {"role": "assistant"}, ASK, FOUR]]}
    made = preference({**record, "ranks": [2, 1, 1]})
    assert made.completions == ("4[end]", "4[end][user]2+2?[end][assistant]4[end]", "5[end]")
    assert made.ranks == (0, 0, 1)
    assert preference({**PAIR, "margin": 2}).margin == 2.0
    assert preference({"prompt": [ASK], "completion": [FIVE], "label": False}).label is False
    assert not preference_of({"text": "2+2=4"}, FORMATS["text"], ORIGIN, plain).templated


THINKS = HEADERS + "{% if add_generation_prompt %}[assistant]<think>{% endif %}"
SUMS = "[{{ messages | length }}]" + HEADERS + GENERATION
STRIPS = "{% for m in messages %}[{{ m.role }}]{{ m.content if loop.last else '' }}[end]{% endfor %}" + GENERATION
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + HEADERS + GENERATION
)


@pytest.mark.parametrize(
    ("template", "alone", "before"),
    [
        pytest.param(THINKS, "'[user]2+2?[end][assistant]<think>'", "'[user]2+2?[end][assistant]4[end]'", id="more"),
        pytest.param(SUMS, "'[1][user]2+2?[end][assistant]'", "'[2][user]2+2?[end][assistant]4[end]'", id="counted"),
        pytest.param(STRIPS, "'[user]2+2?[end][assistant]'", "'[user][end][assistant]4[end]'", id="stripped"),
    ],
)
def test_a_prompt_that_the_conversation_does_not_begin_with_is_an_error(template, alone, before):
    with pytest.raises(InputError) as error:
        preference(PAIR, template)
    assert str(error.value).startswith(
        f"chats.jsonl, line 3: completion 1 of 2: the chat template writes the prompt as {alone} when it stands alone "
        f"and as {before} before this completion; allowed: a prompt that the conversation begins with; "
    )


def test_a_template_that_writes_nothing_of_the_completion_is_an_error():
    with pytest.raises(
        InputError, match=r"^chats.jsonl, line 3: completion 1 of 2: the chat template writes nothing of"
    ):
        preference(PAIR, "{{ messages[0].content }}")


def test_a_variable_can_make_the_prompt_the_beginning():
    template = (
        HEADERS
        + "{% if add_generation_prompt %}[assistant]{% if enable_thinking != false %}<think>{% endif %}{% endif %}"
    )
    with pytest.raises(InputError, match=r'try chat_template_kwargs such as \{"enable_thinking": false\}'):
        preference(PAIR, template)
    assert preference({**PAIR, "chat_template_kwargs": {"enable_thinking": False}}, template) == preference(PAIR)


def test_an_error_shows_no_more_than_where_the_texts_part():
    long = {"role": "user", "content": "x" * 1000}
    with pytest.raises(InputError) as error:
        preference({**PAIR, "prompt": [long]}, THINKS)
    assert "<think>" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("record", "template", "complaint"),
    [
        (PAIR, None, "the record holds messages, and the tokenizer has no chat template to write them as text; "),
        ({**PAIR, "prompt": [SYSTEM, ASK]}, STRICT, "the chat template refuses the messages (TemplateError: no system"),
        (PAIR, "{{ messages[0].content + 1 }}", "the chat template refuses the messages (TypeError: "),
        (PAIR, "{% for %}", "the chat template refuses the messages (TemplateSyntaxError: "),
        (
            {**PAIR, "tools": [{"name": "add"}]},
            HEADERS + GENERATION,
            "field 'tools' changes nothing: the chat template",
        ),
        ({**PAIR, "chosen": [CALL]}, HEADERS + GENERATION, "'tool_calls' change nothing: the chat template does not"),
        (
            {**PAIR, "chat_template_kwargs": {"tokenize": True}},
            HEADERS + GENERATION,
            "field 'chat_template_kwargs' has 'tokenize'; allowed: variables that the template reads; ",
        ),
        (
            {**PAIR, "chat_template_kwargs": {"messages": []}},
            HEADERS + GENERATION,
            "the chat template refuses the messages (TypeError: ",
        ),
    ],
)
def test_what_cannot_be_rendered_is_an_error_with_its_origin(record, template, complaint):
    with pytest.raises(InputError) as error:
        preference(record, template)
    assert str(error.value).startswith(f"chats.jsonl, line 3: {complaint}")


def test_plain_text_of_a_conversation():
    made = preference_of(
        {"prompt": [SYSTEM, ASK], "chosen": [FOUR], "rejected": [CALL]}, FORMATS["messages"], ORIGIN, plain
    )
    assert made.prompt == "system: Be brief.\nuser: 2+2?\n"
    assert made.completions == (
        "assistant: 4\n",
        'assistant: {"function": {"name": "add", "arguments": {"a": 2}}}\n',
    )
