"""Writes golden/trl_ids.json: what TRL's own trainers make of the records below, with SmolLM2's tokenizer.

Beside it, golden/smollm2.json: that tokenizer, cut down to what these records need, with the ids of the whole one. It
is proven here to give the same ids. Run from the root of a clone in an environment of its own, with the directory of
the SmolLM2 model or its tokenizer: `pip install trl==1.16.0`, `python -m tests.data.make_golden_ids DIRECTORY`.
"""

import itertools
import json
import pathlib
import sys
import types
from typing import Any

GOLDEN = pathlib.Path(__file__).parent / "golden"
IDS, TOKENIZER = GOLDEN / "trl_ids.json", GOLDEN / "smollm2.json"
NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")

SYSTEM = {"role": "system", "content": "Answer in one word."}
ASK = {"role": "user", "content": "What is 12 + 30?\nThink first."}
REPLY = {"role": "assistant", "content": "42"}
AGAIN = {"role": "user", "content": "In Roman numerals, s'il vous plaît 🙂"}
GOOD, BAD = {"role": "assistant", "content": "XLII"}, {"role": "assistant", "content": "I don't know, 42 ≠ 24!"}
TURNS = "\n\nHuman: Hi, what's 2+2?\n\nAssistant:"

RECORDS: dict[str, list[dict[str, Any]]] = {
    "pairs": [
        {"prompt": "2+2=", "chosen": "4", "rejected": "22"},
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I guess…"},
        {"prompt": TURNS, "chosen": " It's 4.", "rejected": " Go away!"},
        {"prompt": "שלום! 你好\n", "chosen": "مرحبا 🙂", "rejected": "def f(x):\n    return x  # naïve\n"},
    ],
    "implicit": [
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "What is 2+2?\nFour", "rejected": "What is 2+2?\nIt's 5"},
        {"chosen": f"{TURNS} It's 4.", "rejected": f"{TURNS} Go away!"},
        {"chosen": "The sky is blue", "rejected": "The sky is black"},
        {"chosen": "The sky", "rejected": "The sky is"},
    ],
    "unpaired": [
        {"prompt": "2+2=", "completion": "4", "label": True},
        {"prompt": "The sky is", "completion": " green.", "label": False},
    ],
    "messages": [
        {"prompt": [ASK], "chosen": [REPLY], "rejected": [BAD]},
        {"prompt": [SYSTEM, ASK], "chosen": [REPLY], "rejected": [BAD]},
        {"prompt": [ASK, REPLY, AGAIN], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [REPLY, AGAIN, GOOD], "rejected": [BAD]},
        {"prompt": [ASK, REPLY], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASK], "chosen": [{"role": "assistant", "content": "\n42"}], "rejected": [BAD]},
        {"chosen": [ASK, REPLY], "rejected": [ASK, BAD]},
        {"chosen": [SYSTEM, ASK, REPLY, AGAIN, GOOD], "rejected": [SYSTEM, ASK, REPLY, AGAIN, BAD]},
        {"prompt": [ASK], "completion": [REPLY], "label": True},
        {"prompt": [SYSTEM, ASK, REPLY, AGAIN], "completion": [BAD], "label": False},
    ],
}
"""Format -> records that TRL and jaxdpo must tokenise alike."""
DIFFERENT: dict[str, tuple[str, dict[str, Any]]] = {
    "a merge across the boundary": ("pairs", {"prompt": "The sk", "chosen": "y", "rejected": "ill"}),
    "implicit inside a number": ("implicit", {"chosen": "It is 12", "rejected": "It is 13"}),
    "implicit in the assistant's turn": ("implicit", {"chosen": f"{TURNS} It's 4.", "rejected": f"{TURNS} It's 5."}),
}
"""What differs -> a format and its record that jaxdpo tokenises otherwise, on purpose."""


def trl_ids(tokenizer, record: dict[str, Any]) -> dict[str, list[int]]:
    """Ids that TRL's trainers prepare of one record: prompt_ids, chosen_ids and rejected_ids, or completion_ids."""
    from datasets import Dataset
    from trl import DPOTrainer, KTOTrainer

    arguments = types.SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start", per_device_train_batch_size=1
    )
    stub = types.SimpleNamespace(
        _tokenizer=tokenizer, calculate_KL=False, undesirable_weight=1.0, desirable_weight=1.0, args=arguments
    )
    trainer = KTOTrainer if "label" in record else DPOTrainer
    rows = trainer._prepare_dataset(stub, Dataset.from_list([record]), tokenizer, arguments, "train")
    return {name: ids for name, ids in rows[0].items() if name.endswith("_ids")}


def compact(tokenizer, used: set[int]) -> dict[str, Any]:
    """A tokenizer of the same rules whose vocabulary is bytes, special tokens and what the `used` ids are merged from.

    Every merge between kept tokens is kept, in its rank: as the merges that led to the used ids are among them, and the
    others were passed over with all merges at hand, a text of the records is merged as before.
    """
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab, merges = data["model"]["vocab"], [tuple(merge) for merge in data["model"]["merges"]]
    made_of = {}
    for left, right in merges:
        made_of.setdefault(left + right, []).append((left, right))
    texts = {number: text for text, number in vocab.items()}
    keep = {text for text in vocab if len(text) == 1} | {token["content"] for token in data["added_tokens"]}
    waiting = [texts[number] for number in used if number in texts]
    while waiting:
        token = waiting.pop()
        if token not in keep:
            keep.add(token)
            waiting += itertools.chain(*made_of.get(token, []))
    data["model"]["vocab"] = {text: number for text, number in vocab.items() if text in keep}
    data["model"]["merges"] = [list(merge) for merge in merges if {*merge, "".join(merge)} <= keep]
    return data


def main(directory: str) -> None:
    """Writes both files."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    whole = AutoTokenizer.from_pretrained(directory)
    cases = [(name, record, None) for name, records in RECORDS.items() for record in records]
    cases += [(name, record, why) for why, (name, record) in DIFFERENT.items()]
    golden = [
        {"format": name, "record": record, **({"differs": why} if why else {}), **trl_ids(whole, record)}
        for name, record, why in cases
    ]
    used = {number for case in golden for name in case if name.endswith("_ids") for number in case[name]}
    texts = ["The sk", "y", "ill"]  # of the differences, split as jaxdpo does
    used |= {number for text in texts for number in whole(text)["input_ids"]}
    data = compact(whole, used)
    small = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)), **{name: getattr(whole, name) for name in NAMES}
    )
    for case in golden:
        assert {name: case[name] for name in case if name.endswith("_ids")} == trl_ids(small, case["record"])
    GOLDEN.mkdir(exist_ok=True)
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in golden)
    IDS.write_text(f"[\n{rows}\n]\n", encoding="utf-8")
    facts = {name: getattr(whole, name) for name in NAMES}
    TOKENIZER.write_text(
        json.dumps({**facts, "tokenizer": data}, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main(sys.argv[1])
