"""What ends a completion: tokens, which the compiled programs see, and texts, which only a tokenizer does."""

import dataclasses
from typing import Any

import numpy as np

from jaxdpo.types import InputError


@dataclasses.dataclass(frozen=True)
class Stops:
    """What ends a completion before its length does.

    Attributes:
      eos: tokens that the model ends a text with.
      tokens: others that end one.
      texts: ends a completion that holds one, which is cut off its text.
      tokenizer: a Hugging Face tokenizer, for the texts; None: only tokens are told.
    """

    eos: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    tokenizer: Any = None

    def __post_init__(self) -> None:
        if self.texts and self.tokenizer is None:
            raise InputError(f"stop texts {self.texts} without a tokenizer; allowed: with one; pass the model's own")

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens that end a completion."""
        return (*self.eos, *self.tokens)

    def reason(self, last: int) -> str:
        """Why a completion ended whose text holds no stop: `eos`, `stop` or `length`."""
        if last in self.eos:
            return "eos"
        return "stop" if last in self.tokens else "length"

    def text(self, ids: np.ndarray) -> str | None:
        """The text of drawn tokens without special tokens, the one that ended it, and what begins with a stop text."""
        if self.tokenizer is None:
            return None
        if len(ids) and ids[-1] in self.ids:
            ids = ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text[: min((at for stop in self.texts if (at := text.find(stop)) >= 0), default=len(text))]


def find_stop(stops: Stops, ids: np.ndarray) -> int | None:
    """How many of the tokens it takes for a stop text to stand in what they say; None if it never does."""

    def holds(count: int) -> bool:
        text = stops.tokenizer.decode(ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return any(stop in text for stop in stops.texts)

    if not holds(len(ids)):
        return None
    low, high = 0, len(ids)  # a text that a prefix holds is in every longer one, so halving finds the first
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def eos_ids(source: dict[str, Any] | None, config_eos: int | tuple[int, ...] | None, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text: those of `generation_config.json`, else of `config.json`, and the tokenizer's own.

    Args:
      source: contents of `generation_config.json`, if there is one.
      config_eos: what `config.json` states.
      tokenizer: its EOS ends the texts that a model was trained on here.
    """
    stated = (source or {}).get("eos_token_id")
    stated = config_eos if stated is None else stated
    several = tuple(stated) if isinstance(stated, list | tuple) else (() if stated is None else (stated,))
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
    return tuple(dict.fromkeys((*several, *own)))
