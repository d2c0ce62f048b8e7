"""Where tokenising prompt and completion as one text gives other tokens than tokenising them apart, as `tokenize` does.

Neither is wrong. But whoever generates encodes the prompt alone, and so asks the model for what it was trained on only
where both were tokenised apart; and a prompt whose last token changes with what follows is often one that ends in the
space of the next word.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxdpo.data.encoding import EncodingFacts, encode, encoding_facts
from jaxdpo.data.groups import TokenizedGroup
from jaxdpo.types import Preference


def differs_jointly(tokenized: Sequence[tuple[Preference, TokenizedGroup]], tokenizer: Any) -> list[bool]:
    """Of each preference, whether encoding its prompt together with a completion gives other tokens than its group has.

    Every path is encoded once more, all in one call: this takes longer than tokenising did.

    Args:
      tokenized: preferences with their groups, which may be truncated: what was cut off is not compared.
      tokenizer: the one that made the groups.
    """
    facts = encoding_facts(tokenizer)
    joint = iter(encode(tokenizer, [item.prompt + text for item, _ in tokenized for text in item.completions]))
    differs = []
    for preference, group in tokenized:
        prompt = _without_start(group.prompt, facts)
        paths = [(next(joint), np.concatenate([prompt, completion])) for completion in group.completions]
        differs.append(bool(preference.prompt) and not all(_holds(whole, path, facts.eos) for whole, path in paths))
    return differs


def _without_start(prompt: np.ndarray, facts: EncodingFacts) -> np.ndarray:
    """The tokens of the prompt's own text."""
    start = facts.empty_prompt if len(prompt) == len(facts.empty_prompt) else facts.prefix
    return prompt[len(start) :] if tuple(prompt[: len(start)]) == start else prompt


def _holds(whole: np.ndarray, path: np.ndarray, eos: int) -> bool:
    """Whether a path, with or without its EOS, is a part of the whole: where nothing was cut off, then all of it."""
    text, part = _as_text(whole), _as_text(path)
    return part in text or (path[-1] == eos and part[:-1] in text)


def _as_text(ids: np.ndarray) -> str:
    """One character for each id: finding a string in another is fast, and does not stop between two ids."""
    return np.asarray(ids, "<u4").tobytes().decode("utf-32-le", "surrogatepass")
