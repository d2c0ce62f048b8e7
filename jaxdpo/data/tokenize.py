"""From text to token ids; the one place that decides about BOS, EOS and over-long paths.

Prompt and completions are tokenised apart, so no merge crosses the boundary and every candidate continues the very
same prompt ids. A path is the prompt and ONE completion:

    [what the tokenizer puts before a text] prompt | completion [EOS]

A chat template writes what stands before and behind a text itself, so nothing is added to what it wrote. The tokenizer
is passed in: anything that Hugging Face's `AutoTokenizer` returns.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from jaxdpo.data.content import Unusable
from jaxdpo.data.dataset import Dropped, TokenizedDataset
from jaxdpo.data.encoding import EncodingFacts, encode, encoding_facts
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.types import InputError, Preference

Use = Literal["compare", "imitate", "score"]
"""What the completions of a preference are for."""
CHUNK = 1024
"""Preferences per call of the tokenizer: enough to keep its threads busy, few enough for a moving progress bar."""
CHUNK_CHARACTERS = 1_000_000
"""A call of the tokenizer ends early behind so much text: a token takes some 200 bytes while it is made."""


@dataclasses.dataclass(frozen=True)
class PreferenceTokenizer:
    """Turns preferences into groups of ids.

    Attributes:
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens that the prompt and any one completion (its EOS included) may have together. Longer paths are
        cut: a completion keeps its start, up to half of `max_length` or what the prompt leaves; the prompt keeps its
        end, behind the tokenizer's prefix, as much as its longest completion leaves.
      use: "compare": the completions of a preference have to differ. "imitate": the best of each stays, the first of
        those that tie; of completions with a label those that are good. "score": all stay, and nothing else of the
        record.
      score_prompt: a completion is the prompt's text and its own. The prompt is what predicts its first token: what the
        tokenizer puts before a text or an empty prompt, or the first token that a chat template wrote.
    Raises:
      InputError: if the tokenizer has no EOS token or `max_length` is too small to hold a path.
    """

    tokenizer: Any
    max_length: int
    use: Use = "compare"
    score_prompt: bool = False

    def __post_init__(self) -> None:
        smallest = 2 * max(1, len(self._facts.prefix))  # half of it must hold the prefix, or one token of the prompt
        if self.max_length < smallest:
            raise InputError(
                f"max_length={self.max_length} cannot hold a prompt and a completion; allowed: at least {smallest}"
            )

    def __call__(self, preferences: Sequence[Preference]) -> list[TokenizedGroup | Unusable]:
        """The group of each preference, or why there is none; the texts go to the tokenizer in one call."""
        kept = [self._kept(preference) for preference in preferences]
        texts = [text for item in kept if isinstance(item, Preference) for text in (item.prompt, *item.completions)]
        ids = iter(encode(self.tokenizer, texts))
        return [item if isinstance(item, Unusable) else self._group(item, ids) for item in kept]

    @functools.cached_property
    def _facts(self) -> EncodingFacts:
        return encoding_facts(self.tokenizer)

    def _kept(self, preference: Preference) -> Preference | Unusable:
        """What of a preference is tokenised."""
        if self.use == "compare":
            return preference
        if self.use == "imitate" and preference.label is False:
            return Unusable("the completion is a bad one, and only the best are asked for")
        completions = preference.completions if self.use == "score" else preference.completions[:1]
        return dataclasses.replace(preference, completions=completions, ranks=None, label=None, margin=None)

    def _group(self, preference: Preference, ids: Iterator[np.ndarray]) -> TokenizedGroup | Unusable:
        """Applies the rules for BOS, EOS and over-long paths to the ids of the bare texts, which are taken."""
        prompt, *completions = (next(ids) for _ in range(1 + len(preference.completions)))
        end = np.array([self._facts.eos], np.int32)
        if any(np.array_equal(ids, end[: len(ids)]) for ids in completions):
            return Unusable("a completion has no tokens")
        prefix, text = self._facts.start(prompt, templated=preference.templated)
        if self.score_prompt:
            if not len(prefix):
                prefix, text = (text[:1], text[1:]) if preference.templated else (self._empty_prompt, text)
            completions = [np.concatenate([text, ids]) for ids in completions]
            text = text[:0]
        if not preference.templated:
            completions = [ids if ids[-1] == end else np.concatenate([ids, end]) for ids in completions]
        completion_limit = max(self.max_length // 2, self.max_length - len(prefix) - len(text))
        cut = [ids[:completion_limit] for ids in completions]
        longest = max(map(len, cut))
        if self.use == "compare" and len({ids.tobytes() for ids in cut}) < len(cut):
            return Unusable("two completions are equal once they are cut")
        kept = text[max(0, len(text) - (self.max_length - longest - len(prefix))) :]
        return TokenizedGroup(
            prompt=np.concatenate([prefix, kept]),
            completions=tuple(cut),
            prompt_truncated=len(kept) < len(text),
            completions_truncated=tuple(len(ids) > completion_limit for ids in completions),
            origin=preference.origin,
            ranks=preference.ranks,
            label=preference.label,
            margin=preference.margin,
        )

    @property
    def _empty_prompt(self) -> np.ndarray:
        return np.array(self._facts.empty_prompt, np.int32)


def tokenize_preference(preference: Preference, tokenizer: Any, max_length: int) -> TokenizedGroup:
    """Ids of one preference; `tokenize_dataset` does the same for many, faster.

    Args:
      preference: prompt and completions as text.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens that the prompt and any one completion may have together, see `PreferenceTokenizer`.
    Raises:
      InputError: if the tokenizer has no EOS token or `max_length` is too small to hold a path.
      Unusable: if a completion has no tokens, or two are equal (once truncated).
    """
    group = PreferenceTokenizer(tokenizer, max_length)([preference])[0]
    if isinstance(group, Unusable):
        raise group
    return group


def tokenize_dataset(
    preferences: Iterable[Preference],
    tokenizer: Any,
    max_length: int,
    *,
    use: Use = "compare",
    score_prompt: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> TokenizedDataset:
    """Ids of all preferences, in order and in memory; see `PreferenceTokenizer` for the rules.

    Args:
      preferences: prompts and completions as text.
      tokenizer: a Hugging Face tokenizer.
      max_length: tokens that a prompt and any one completion may have together.
      use: see `PreferenceTokenizer`.
      score_prompt: see `PreferenceTokenizer`.
      progress: called with the number of preferences done since its last call, as `tqdm.update` wants it.
    Raises:
      InputError: as `tokenize_preference`, if no preference is usable, and if some have a label and others none.
    """
    to_groups = PreferenceTokenizer(tokenizer, max_length, use, score_prompt)
    groups: list[TokenizedGroup] = []
    dropped: list[tuple[Any, str]] = []
    check = one_kind(use)
    for chunk in chunks(preferences):
        for item, group in zip(chunk, to_groups(chunk), strict=True):
            check(item)
            if isinstance(group, Unusable):
                dropped.append((item.origin, str(group)))
            else:
                groups.append(group)
        if progress is not None:
            progress(len(chunk))
    if not groups:
        raise InputError(
            f"none of {len(dropped)} preferences is usable after tokenisation, {Dropped(dropped).summary()}; "
            f"allowed: at least one; raise max_length={max_length} or correct the data"
        )
    return TokenizedDataset.of(groups, dropped)


def chunks(preferences: Iterable[Preference]) -> Iterator[list[Preference]]:
    """Preferences in lists of bounded size and text, none of them empty."""
    chunk: list[Preference] = []
    characters = 0
    for item in preferences:
        chunk.append(item)
        characters += len(item.prompt) + sum(map(len, item.completions))
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def one_kind(use: Use) -> Callable[[Preference], None]:
    """A check of one preference after another: InputError if some have a label and others none.

    Args:
      use: unless completions are compared, labels do not matter.
    """
    first: Preference | None = None

    def check(item: Preference) -> None:
        nonlocal first
        first = first or item
        if use == "compare" and (item.label is None) != (first.label is None):
            raise InputError(
                f"{item.origin}: label is {item.label}, but {first.label} in {first.origin}; "
                "allowed: true or false in all records, or a label in none; make two datasets"
            )

    return check
