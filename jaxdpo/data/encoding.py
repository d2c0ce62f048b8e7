"""What a tokenizer does around a text, asked once by encoding one; nothing is read off names or pad ids.

The tokenizer is passed in: anything that Hugging Face's `AutoTokenizer` returns.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from jaxdpo.types import InputError

PROBES = ("a", "0", "Hello world")
"""Texts that show what a tokenizer adds to a text; the first that has a token of its own is used."""


@dataclasses.dataclass(frozen=True)
class EncodingFacts:
    """What a tokenizer does around a text.

    Attributes:
      prefix: ids it puts before every text: BOS for Llama 3, none for SmolLM2 and GPT-2.
      eos: id that ends a completion.
      empty_prompt: ids that stand for a prompt without tokens, because the first completion token needs a predictor.
    """

    prefix: tuple[int, ...]
    eos: int
    empty_prompt: tuple[int, ...]

    def start(self, prompt: np.ndarray, *, templated: bool) -> tuple[np.ndarray, np.ndarray]:
        """What stands before a prompt and is never cut, and the prompt without it.

        Args:
          prompt: ids of the bare text.
          templated: a chat template has written it, and nothing is added.
        """
        prefix = np.array(self.prefix, np.int32)
        written = np.array_equal(prompt[: len(prefix)], prefix)  # by a chat template, or in the text itself
        text = prompt[len(prefix) :] if written else prompt
        if not len(text):
            return np.array(self.empty_prompt, np.int32), text
        return (prefix[:0] if templated and not written else prefix), text


def encoding_facts(tokenizer: Any) -> EncodingFacts:
    """Asks a tokenizer what it puts before a text, by encoding one with and without its special tokens.

    Raises:
      InputError: if the tokenizer has no EOS token, or changes the text's own ids when it adds special tokens.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, so no completion can be given an end; "
            "allowed: a tokenizer with an EOS token; set eos_token in its tokenizer_config.json"
        )
    eos = int(tokenizer.eos_token_id)
    plain, whole = _probe(tokenizer)
    starts = [i for i in range(len(whole)) if whole[i : i + len(plain)] == plain]
    if not plain or not starts:
        raise InputError(
            f"the tokenizer encodes {PROBES[-1]!r} as {plain} alone and as {whole} with its special tokens; "
            "allowed: the same ids with others before or behind them; use the tokenizer that the model was trained with"
        )
    prefix = tuple(whole[: starts[0]])
    bos = tokenizer.bos_token_id
    return EncodingFacts(prefix, eos, prefix or (eos if bos is None else int(bos),))


def encode(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Ids of texts, int32, nothing added and nothing cut; `verbose=False` silences the warning about long texts."""
    if not texts:
        return []
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        truncation=False,
        padding=False,
        verbose=False,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    ends = np.cumsum([len(ids) for ids in encoded])
    flat = np.fromiter(itertools.chain.from_iterable(encoded), np.int32, ends[-1])  # a third of np.array for each text
    return [flat[end - len(ids) : end] for ids, end in zip(encoded, ends, strict=True)]


def _probe(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of a text without and with the tokenizer's special tokens."""
    for text in PROBES:
        plain, whole = encode(tokenizer, [text])[0].tolist(), list(tokenizer(text)["input_ids"])
        if plain:
            break
    return plain, whole
