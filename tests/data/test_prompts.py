"""Prompts come from any source, and what is no prompt is refused with its place."""

import json

import numpy as np
import pytest

from jaxdpo.data.prompts import open_prompts, read_prompts
from jaxdpo.data.tokenize import tokenize_preference
from jaxdpo.types import InputError, Origin, Preference
from tests.data.toy_tokenizers import smollm2, toy_tokenizer
from tests.tiny import write_records

ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def contents(path, tokenizer=None, **options):
    return [p.content.prompt for p in read_prompts(str(path), tokenizer or toy_tokenizer(), **options)]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "2+2="},
        {"prompt": "2+2=", "source": "sums", "answer": 4},
        {"prompt": "2+2=", "chosen": " 4", "rejected": " 5"},
        {"prompt": "2+2=", "completion": " 4", "label": None},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
    ],
)
def test_records_of_any_format_have_a_prompt(tmp_path, record):
    expected = record.get("prompt", "\n\nHuman: Hi\n\nAssistant:")
    assert contents(write_records(tmp_path / "d.jsonl", [record])) == [expected]


@pytest.mark.parametrize("record", [{"prompt": [ASK]}, {"messages": [ASK]}, {"messages": [ASK, SAY]}])
def test_messages_go_through_the_template(tmp_path, record):
    path, tokenizer = write_records(tmp_path / "d.jsonl", [record]), smollm2()
    (found,) = read_prompts(str(path), tokenizer)
    text = tokenizer.apply_chat_template([ASK], add_generation_prompt=True, tokenize=False)
    assert found.content.prompt == [ASK] and found.ids.dtype == np.int32
    assert found.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("template", ["$A", "<bos> $A", "$A <eos>"])
def test_prompts_have_the_tokens_that_training_gives_them(tmp_path, template):
    tokenizer = toy_tokenizer(template=template)
    path = write_records(tmp_path / "d.jsonl", [{"prompt": text} for text in ("the sum", "", "a")[::2]])
    for found in read_prompts(str(path), tokenizer):
        trained = tokenize_preference(
            Preference(found.content.prompt, ("b", "c"), Origin("x", 1)), tokenizer, max_length=99
        )
        np.testing.assert_array_equal(found.ids, trained.prompt)


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    (tmp_path / "p.txt").write_bytes("\ufeffOne day\r\n\n  \nThere was\n".encode())
    found = list(read_prompts(str(tmp_path / "p.txt"), toy_tokenizer()))
    assert [(p.content.prompt, p.origin.number) for p in found] == [("One day", 1), ("There was", 4)]
    (tmp_path / "json.txt").write_text(json.dumps({"prompt": "a"}) + "\n")
    assert contents(tmp_path / "json.txt") == ["a"], "a file is told by its content"
    assert contents(f"{tmp_path}/*.txt") == ["a", "One day", "There was"]


def test_a_stated_format_is_read(tmp_path):
    record = {"chosen": "Is it? yes", "rejected": "Is it? no", "prompt": "no part of it"}
    path = write_records(tmp_path / "d.jsonl", [record])
    assert contents(path, format="implicit") == ["Is it?"] != contents(path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"prompt": "a"}, {"prompt": ""}], r"d.jsonl, line 2: the prompt is empty; allowed: at least one token"),
        ([{"text": "all of it"}], r"d.jsonl, line 1: the prompt is empty"),
        ([{"prompt": 3}], r"d.jsonl, line 1: field 'prompt' is a number; allowed: a string"),
        ([{"prompt": []}], r"d.jsonl, line 1: field 'prompt' is an empty list"),
        ([{"prompt": [ASK]}], r"d.jsonl, line 1: the record holds messages, and the tokenizer has no chat template"),
        ([{"question": "2+2"}], r"d.jsonl, line 1: no format fits"),
        ([{"chosen": "ab", "rejected": "cd"}], r"d.jsonl, line 1: "),
    ],
)
def test_what_is_no_prompt_is_refused(tmp_path, records, message):
    with pytest.raises(InputError, match=message):
        contents(write_records(tmp_path / "d.jsonl", records))


def test_a_text_file_without_text_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("\n \n")
    (source,) = open_prompts(str(tmp_path / "p.txt"))
    with pytest.raises(InputError, match="holds no record"):
        list(source.records())
