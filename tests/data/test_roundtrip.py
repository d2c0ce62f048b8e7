"""Every format, tokenised into trees and decoded again, shows exactly the text that went in."""

import copy

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from jaxdpo.data.batch import build_batch
from jaxdpo.data.chat import Renderer
from jaxdpo.data.dataset import TokenizedDataset
from jaxdpo.data.encoding import encoding_facts
from jaxdpo.data.formats import FORMATS, Unusable, preference_of
from jaxdpo.data.packing import Capacity, Shape
from jaxdpo.data.tokenize import tokenize_preference
from jaxdpo.types import Origin, check_batch
from tests.data.toy_tokenizers import (
    GPT2_LIKE,
    LLAMA_LIKE,
    SMOLLM_LIKE,
    metaspace_tokenizer,
    smollm2,
    toy_tokenizer,
)

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TOKENIZERS = {
    "smollm2 in small": smollm2(),
    "smollm": copy.deepcopy(SMOLLM_LIKE),  # other tests have them too, without the template
    "gpt2": copy.deepcopy(GPT2_LIKE),
    "llama 3": copy.deepcopy(LLAMA_LIKE),
    "llama 2": metaspace_tokenizer(),
    "no bos": toy_tokenizer(bos=None),
}
END = {"llama 2": "[end]"}  # it puts a space of its own behind each special token
for name, tokenizer in list(TOKENIZERS.items())[1:]:
    tokenizer.chat_template = TEMPLATE.replace("<eos>", END.get(name, "<eos>"))

SPECIAL = ("<bos>", "<eos>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "▁")
"""Texts that a tokenizer takes for something of its own."""
SAMPLES = st.sampled_from(
    [
        "the 12 34th",
        "🙂👩‍👩‍👧",
        "שלום עולם",
        "مرحبا",
        "\u202eabc\u202c",
        "e\u0301",
        "\x00\x1b",
        "\r\n\t",
        "<0x41>",
        "  a  ",
        "天空",
    ]
)
SMOLLM2_LACKS = "\x04\x06\x13\x14\x16\x1d"
"""Characters that SmolLM2's vocabulary has no byte for, as for those from U+40000 to U+BFFFF, none of them assigned."""
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters=SMOLLM2_LACKS)
TEXT = st.lists(st.text(CHARACTERS, max_size=8) | SAMPLES, max_size=4).map("".join)
TEXT = TEXT.filter(lambda text: not any(special in text for special in SPECIAL))
SAID = TEXT.filter(str.strip)
TWO, SEVERAL = (st.lists(SAID, min_size=2, max_size=most, unique=True) for most in (2, 4))
TURNS = st.sampled_from(
    ["\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: So?\n\nAssistant:"]
)


def message(role, content):
    return {"role": role, "content": content}


def compared(prompt, completions):
    return {"prompt": prompt, "chosen": completions[0], "rejected": completions[1]}


def whole(prompt, completions):
    return {"chosen": prompt + completions[0], "rejected": prompt + completions[1]}


def conversation(prompt, completions):
    return {
        "prompt": [message("user", prompt)],
        "completions": [[message("assistant", completion)] for completion in completions],
    }


RECORDS = {
    "pairs": st.builds(compared, TEXT, TWO),
    "implicit": st.builds(whole, TEXT, TWO),
    "hh": st.builds(whole, TURNS, TWO),
    "ranked": st.builds(lambda prompt, several: {"prompt": prompt, "completions": several}, TEXT, SEVERAL),
    "unpaired": st.builds(lambda prompt, one: {"prompt": prompt, "completion": one, "label": True}, TEXT, SAID),
    "completion": st.builds(lambda prompt, one: {"prompt": prompt, "completion": one}, TEXT, SAID),
    "text": st.builds(lambda one: {"text": one}, SAID),
    "messages": st.builds(conversation, TEXT, SEVERAL),
}


def texts_in(name, record, tokenizer_name):
    """What a record says, written out here by hand: the prompt, None where the format finds it, and whole texts."""
    if name in ("implicit", "hh"):
        return None, [record["chosen"], record["rejected"]]
    if name == "text":
        return "", [record["text"]]
    if name == "messages":
        user, answers = record["prompt"][0]["content"], [one[0]["content"] for one in record["completions"]]
        if tokenizer_name == "smollm2 in small":
            system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
            start = (
                f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
            )
            return start, [f"{start}{answer}<|im_end|>\n" for answer in answers]
        end = END.get(tokenizer_name, "<eos>")
        start = f"[user]{user}{end}[assistant]"
        return start, [f"{start}{answer}{end}" for answer in answers]
    answers = [record[field] for field in ("chosen", "rejected", "completion") if field in record]
    return record["prompt"], [record["prompt"] + answer for answer in [*answers, *record.get("completions", [])]]


def tree_of(preference, tokenizer):
    """The preference as a batch of one row: ids of the prompt, and of each completion, all of them scored."""
    group = tokenize_preference(preference, tokenizer, 1_000_000)
    shape = Shape(Capacity(group.tokens, group.slots, 1, len(group.completions)), 1)
    batch = build_batch(TokenizedDataset.of([group]), [[0]], shape)
    check_batch(batch)
    parts = [batch.tokens[0, batch.candidate[0] == part].tolist() for part in range(len(group.completions) + 1)]
    for which, completion in enumerate(parts[1:]):
        assert batch.slot_target[0, batch.slot_owner[0] == which].tolist() == completion
    return parts


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def check_round_trip(name, record, tokenizer_name):
    tokenizer = TOKENIZERS[tokenizer_name]
    preference = preference_of(record, FORMATS[name], Origin("texts.jsonl", 1), Renderer(tokenizer))
    prompt, wholes = texts_in(name, record, tokenizer_name)
    facts = encoding_facts(tokenizer)
    prompt_ids, *completions = tree_of(preference, tokenizer)
    assert len(completions) == len(wholes)
    if preference.prompt == "":
        assert prompt_ids == list(facts.empty_prompt)
        prompt_ids = []
    elif not preference.templated:
        assert prompt_ids[: len(facts.prefix)] == list(facts.prefix)
        prompt_ids = prompt_ids[len(facts.prefix) :]
    start = decoded(tokenizer, prompt_ids)
    assert prompt is None or start == prompt
    for completion, text in zip(completions, wholes, strict=True):
        assert preference.templated or completion.pop() == facts.eos
        assert start + decoded(tokenizer, completion) == text


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_random_text(name, tokenizer_name, data):
    record = data.draw(RECORDS[name])
    try:
        check_round_trip(name, record, tokenizer_name)
    except Unusable:
        reject()  # an implicit prompt with nothing behind it


LONG = "The 1234th 🙂 שלום\n\n  天空 " * 3000


@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_completion_of_100_kilobytes(name, tokenizer_name):
    assert len(LONG.encode()) > 100_000
    records = {
        "pairs": compared("", [LONG, "no"]),
        "implicit": whole("Q: ", [LONG, "no"]),
        "hh": whole("\n\nAssistant:", [LONG, "no"]),
        "ranked": {"prompt": LONG, "completions": [LONG, "no", " no"]},
        "unpaired": {"prompt": "", "completion": LONG, "label": False},
        "completion": {"prompt": "", "completion": LONG},
        "text": {"text": LONG},
        "messages": conversation("", [LONG, "no"]),
    }
    check_round_trip(name, records[name], tokenizer_name)


@pytest.mark.parametrize(("tokenizer_name", "special"), [("smollm2 in small", "<|im_end|>"), ("llama 3", "<eos>")])
def test_special_tokens_written_in_a_text_are_those_tokens(tokenizer_name, special):
    """The tokenizer cannot tell a text about a special token from the token; what is shown is the text all the same."""
    tokenizer = TOKENIZERS[tokenizer_name]
    record = compared(f"What is {special}?", [f" {special} is a token", " No idea"])
    check_round_trip("pairs", record, tokenizer_name)
    prompt, completion, _ = tree_of(preference_of(record, FORMATS["pairs"], Origin("texts.jsonl", 1)), tokenizer)
    assert tokenizer.eos_token_id in prompt and tokenizer.eos_token_id in completion[:-1]


@pytest.mark.parametrize("character", [*SMOLLM2_LACKS, "\U00040000"])
def test_smollm2_lacks_some_bytes(character):
    """What a tokenizer has no token for is lost, whatever the format."""
    tokenizer = TOKENIZERS["smollm2 in small"]
    assert decoded(tokenizer, tokenizer(character)["input_ids"]) != character
