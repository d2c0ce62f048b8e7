"""From text to token ids; the one place that decides about BOS, EOS and over-long paths.

Prompt and completions are tokenised apart, so no merge crosses the boundary and every candidate continues the very
same prompt ids. A path is the prompt and ONE completion:

    [what the tokenizer puts before a text] prompt | completion [EOS]

The tokenizer is passed in: anything that Hugging Face's `AutoTokenizer` returns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxdpo.data.formats import Unusable, describe_dropped
from jaxdpo.types import InputError, Preference

CHUNK = 1024
"""Preferences per call of the tokenizer: enough to keep its threads busy, few enough for a moving progress bar."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedGroup:
    """One prompt and its completions as ids, best first; every path fits `max_length`.

    Attributes:
      prompt: int32 `[prompt tokens]`, at least one.
      completions: int32 `[completion tokens]` each, at least one; EOS included where the end was not cut off.
      prompt_truncated: the prompt lost its beginning.
      completions_truncated: which completions lost their end.
      source: the file it came from, for messages.
      line: its line in that file, from 1.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    prompt_truncated: bool
    completions_truncated: tuple[bool, ...]
    source: str
    line: int

    @property
    def slots(self) -> int:
        """Scored tokens: those of all completions."""
        return sum(map(len, self.completions))

    @property
    def tokens(self) -> int:
        """Row positions that it takes: the prompt once, and all completions."""
        return len(self.prompt) + self.slots

    @property
    def longest_path(self) -> int:
        """Tokens of the prompt and its longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedDataset:
    """All groups of a data file; a group's index here is its `Batch.example_id`.

    Attributes:
      groups: in file order.
      tokens: int32 `[len(groups)]`, `TokenizedGroup.tokens` of each.
      slots: int32 `[len(groups)]`, `TokenizedGroup.slots` of each.
      dropped: `(line, reason)` of every preference that tokenisation left without use.
    """

    groups: list[TokenizedGroup]
    tokens: np.ndarray
    slots: np.ndarray
    dropped: tuple[tuple[int, str], ...]

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def candidates(self) -> int:
        """Completions of the group that has most."""
        return max(len(group.completions) for group in self.groups)

    @property
    def truncated_prompts(self) -> int:
        """Prompts that lost their beginning."""
        return sum(group.prompt_truncated for group in self.groups)

    @property
    def truncated_completions(self) -> int:
        """Completions that lost their end."""
        return sum(sum(group.completions_truncated) for group in self.groups)

    def summary(self) -> str:
        """One line: groups, tokens, what was cut and which rows were dropped."""
        return (
            f"{len(self)} groups, {self.tokens.sum():,} tokens of which {self.slots.sum():,} are scored, "
            f"{self.truncated_prompts} prompts lost their beginning, "
            f"{self.truncated_completions} completions lost their end, {describe_dropped(self.dropped)}"
        )


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


def tokenize_preference(preference: Preference, tokenizer: Any, max_length: int) -> TokenizedGroup:
    """Ids of one preference; `tokenize_dataset` does the same for many, faster.

    Args:
      preference: prompt and completions as text.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens that the prompt and any one completion (its EOS included) may have together. Longer paths are
        cut: a completion keeps its start, up to half of `max_length` or what the prompt leaves; the prompt keeps its
        end, behind the tokenizer's prefix, as much as its longest completion leaves.
    Raises:
      InputError: if the tokenizer has no EOS token or `max_length` is too small to hold a path.
      Unusable: if a completion has no tokens, or two are equal (once truncated).
    """
    facts = encoding_facts(tokenizer)
    _check_max_length(max_length, facts)
    prompt, *completions = _encode(tokenizer, [preference.prompt, *preference.completions])
    return _group(preference, prompt, completions, facts, max_length)


def tokenize_dataset(
    preferences: Sequence[Preference],
    tokenizer: Any,
    max_length: int,
    *,
    progress: Callable[[int], Any] | None = None,
) -> TokenizedDataset:
    """Ids of all preferences, in order; see `tokenize_preference` for the rules.

    Args:
      preferences: prompts and completions as text.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens that a prompt and any one completion may have together.
      progress: called with the number of preferences done since its last call, as `tqdm.update` wants it.
    Raises:
      InputError: as `tokenize_preference`, and if no preference is usable.
    """
    facts = encoding_facts(tokenizer)
    _check_max_length(max_length, facts)
    groups: list[TokenizedGroup] = []
    dropped: list[tuple[int, str]] = []
    for start in range(0, len(preferences), CHUNK):
        chunk = preferences[start : start + CHUNK]
        ids = iter(_encode(tokenizer, [text for item in chunk for text in (item.prompt, *item.completions)]))
        for item in chunk:
            prompt, *completions = (next(ids) for _ in range(1 + len(item.completions)))
            try:
                groups.append(_group(item, prompt, completions, facts, max_length))
            except Unusable as reason:
                dropped.append((item.line, str(reason)))
        if progress is not None:
            progress(len(chunk))
    if not groups:
        raise InputError(
            f"none of {len(preferences)} preferences is usable after tokenisation, {describe_dropped(dropped)}; "
            f"allowed: at least one; raise max_length={max_length} or correct the data"
        )
    tokens = np.array([group.tokens for group in groups], np.int32)
    slots = np.array([group.slots for group in groups], np.int32)
    return TokenizedDataset(groups, tokens, slots, tuple(dropped))


def _group(
    preference: Preference, prompt: list[int], completions: list[list[int]], facts: EncodingFacts, max_length: int
) -> TokenizedGroup:
    """Applies the rules for BOS, EOS and over-long paths to the ids of the bare texts."""
    if any(ids in ([], [facts.eos]) for ids in completions):
        raise Unusable("a completion has no tokens")
    prefix = list(facts.prefix)
    text = prompt[len(prefix) :] if prompt[: len(prefix)] == prefix else prompt  # a chat template may have written BOS
    if not text:
        prefix = list(facts.empty_prompt)
    ended = [ids if ids[-1] == facts.eos else [*ids, facts.eos] for ids in completions]
    completion_limit = max(max_length // 2, max_length - len(prefix) - len(text))
    cut = [ids[:completion_limit] for ids in ended]
    if len(set(map(tuple, cut))) < len(cut):
        raise Unusable(f"two completions have the same first {max(map(len, cut))} tokens")
    text_limit = max_length - max(map(len, cut)) - len(prefix)
    kept = text[max(0, len(text) - text_limit) :]
    return TokenizedGroup(
        prompt=np.array(prefix + kept, np.int32),
        completions=tuple(np.array(ids, np.int32) for ids in cut),
        prompt_truncated=len(kept) < len(text),
        completions_truncated=tuple(len(ids) > completion_limit for ids in ended),
        source=preference.source,
        line=preference.line,
    )


def _check_max_length(max_length: int, facts: EncodingFacts) -> None:
    smallest = 2 * max(1, len(facts.prefix))  # half of it must hold the prefix, or one token of the prompt
    if max_length < smallest:
        raise InputError(f"max_length={max_length} cannot hold a prompt and a completion; allowed: at least {smallest}")


def _probe(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids of a text without and with the tokenizer's special tokens."""
    for text in PROBES:
        plain, whole = _encode(tokenizer, [text])[0], list(tokenizer(text)["input_ids"])
        if plain:
            break
    return plain, whole


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of texts, nothing added and nothing cut; `verbose=False` silences the warning about long texts."""
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return [list(ids) for ids in encoded["input_ids"]]
