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

from jaxdpo.data.encoding import EncodingFacts, encode, encoding_facts
from jaxdpo.data.formats import Unusable, describe_dropped
from jaxdpo.types import UNRANKED, InputError, Origin, Preference

CHUNK = 1024
"""Preferences per call of the tokenizer: enough to keep its threads busy, few enough for a moving progress bar."""


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedGroup:
    """One prompt and its completions as ids, best first; every path fits `max_length`.

    Attributes:
      prompt: int32 `[prompt tokens]`, at least one.
      completions: int32 `[completion tokens]` each, at least one; EOS included where the end was not cut off.
      prompt_truncated: the prompt lost its beginning.
      completions_truncated: which completions lost their end.
      origin: as `Preference.origin`.
      ranks: as `Preference.ranks`.
      label: as `Preference.label`.
      margin: as `Preference.margin`.
    """

    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]
    prompt_truncated: bool
    completions_truncated: tuple[bool, ...]
    origin: Origin
    ranks: tuple[int, ...] | None = None
    label: bool | None = None
    margin: float | None = None

    @property
    def candidate_ranks(self) -> tuple[int, ...]:
        """`Batch.rank` of each completion. Behind a labelled one stands at most its partner, which is not ranked."""
        if self.ranks is not None:
            return self.ranks
        places = range(len(self.completions))
        return tuple(places) if self.label is None else tuple(place and UNRANKED for place in places)

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
      dropped: `(origin, reason)` of every preference that tokenisation left without use.
    """

    groups: list[TokenizedGroup]
    tokens: np.ndarray
    slots: np.ndarray
    dropped: tuple[tuple[Origin, str], ...]

    @classmethod
    def of(cls, groups: list[TokenizedGroup], dropped: Sequence[tuple[Origin, str]] = ()) -> "TokenizedDataset":
        """The dataset of these groups, counted."""
        tokens = np.array([group.tokens for group in groups], np.int32)
        slots = np.array([group.slots for group in groups], np.int32)
        return cls(groups, tokens, slots, tuple(dropped))

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def labelled(self) -> bool:
        """Whether completions are judged one by one; otherwise they are compared."""
        return self.groups[0].label is not None

    @property
    def has_ranks(self) -> bool:
        """Whether any group has completions that tie or are not ranked."""
        return any(group.ranks is not None for group in self.groups)

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
    prompt, *completions = encode(tokenizer, [preference.prompt, *preference.completions])
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
      InputError: as `tokenize_preference`, if no preference is usable, and if some have a label and others none.
    """
    facts = encoding_facts(tokenizer)
    _check_max_length(max_length, facts)
    _check_one_kind(preferences)
    groups: list[TokenizedGroup] = []
    dropped: list[tuple[Origin, str]] = []
    for start in range(0, len(preferences), CHUNK):
        chunk = preferences[start : start + CHUNK]
        ids = iter(encode(tokenizer, [text for item in chunk for text in (item.prompt, *item.completions)]))
        for item in chunk:
            prompt, *completions = (next(ids) for _ in range(1 + len(item.completions)))
            try:
                groups.append(_group(item, prompt, completions, facts, max_length))
            except Unusable as reason:
                dropped.append((item.origin, str(reason)))
        if progress is not None:
            progress(len(chunk))
    if not groups:
        raise InputError(
            f"none of {len(preferences)} preferences is usable after tokenisation, {describe_dropped(dropped)}; "
            f"allowed: at least one; raise max_length={max_length} or correct the data"
        )
    return TokenizedDataset.of(groups, dropped)


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
        origin=preference.origin,
        ranks=preference.ranks,
        label=preference.label,
        margin=preference.margin,
    )


def _check_one_kind(preferences: Sequence[Preference]) -> None:
    for item in preferences:
        if (item.label is None) != (preferences[0].label is None):
            raise InputError(
                f"{item.origin}: label is {item.label}, but {preferences[0].label} in the first of "
                "these preferences; allowed: true or false in all of them, or None in all; make two datasets"
            )


def _check_max_length(max_length: int, facts: EncodingFacts) -> None:
    smallest = 2 * max(1, len(facts.prefix))  # half of it must hold the prefix, or one token of the prompt
    if max_length < smallest:
        raise InputError(f"max_length={max_length} cannot hold a prompt and a completion; allowed: at least {smallest}")
