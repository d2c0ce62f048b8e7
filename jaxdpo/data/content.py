"""What a record says, whatever its format: a prompt and completions, best first, as text or as messages."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxdpo.data import fields
from jaxdpo.data.fields import Record
from jaxdpo.types import UNRANKED, InputError

Messages = list[dict[str, Any]]
"""Part of a conversation: objects with `role`, `content` and whatever else the model's chat template reads."""


class Unusable(Exception):
    """A well-formed record that no preference can be made from; the message is the reason it is dropped for."""


class Content(NamedTuple):
    """What a record says.

    Attributes:
      prompt: text, or messages.
      completions: texts, or messages of each; best first.
      ranks: as `Preference.ranks`.
      label: as `Preference.label`.
      margin: as `Preference.margin`.
      tools: JSON schemas of the functions that the assistant may call; only with messages.
      chat_template_kwargs: variables for the chat template, such as `enable_thinking`; only with messages.
    """

    prompt: str | Messages
    completions: tuple[str | Messages, ...]
    ranks: tuple[int, ...] | None = None
    label: bool | None = None
    margin: float | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def __repr__(self) -> str:
        """Names only what the record states."""
        stated = (f"{name}={value!r}" for name, value in self._asdict().items() if value is not None)
        return f"Content({', '.join(stated)})"


Format = Callable[[Record], Content]
Render = Callable[[Content], Content]
"""Turns the messages of a content into texts."""


def best_first(record: Record, prompt: str | Messages, completions: Sequence[str | Messages]) -> Content:
    """Puts a record's completions in the order that its `ranks` or `scores` state.

    Raises:
      InputError: if they are not one number for each completion, or both fields are there.
    """
    keys = _sort_keys(record, len(completions))
    if keys is None:
        return Content(prompt, tuple(completions))
    levels = sorted(set(keys))
    dense = {key: UNRANKED if key == math.inf else rank for rank, key in enumerate(levels)}
    order = sorted(range(len(keys)), key=keys.__getitem__)  # tied completions stay as they stand
    ranks = tuple(dense[keys[i]] for i in order)
    strict = ranks == tuple(range(len(ranks)))
    return Content(prompt, tuple(completions[i] for i in order), None if strict else ranks)


def check_comparable(content: Content) -> None:
    """Unusable if the completions of a content are not told apart: two are equal, all tie, or none is ranked."""
    if len(set(map(str, content.completions))) < len(content.completions):
        raise Unusable("two completions are equal")
    if content.ranks is not None and len(set(content.ranks)) == 1:
        raise Unusable("no completion is ranked" if content.ranks[0] == UNRANKED else "all completions tie")


def shared(first: Sequence, second: Sequence) -> int:
    """How many characters or messages two texts or conversations begin with alike.

    Example:
      >>> shared("blue", "black")
      2
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _sort_keys(record: Record, count: int) -> list[float] | None:
    """By what the completions are sorted, lowest first, infinity if not ranked; None: they stand best first."""
    stated = fields.present(record) & {"ranks", "scores"}
    if len(stated) == 2:
        raise InputError(
            "the record has both fields 'ranks' and 'scores'; allowed: one of them, or neither where the completions "
            "stand best first; delete one"
        )
    if "ranks" in stated:
        return [math.inf if rank is None else rank for rank in fields.ranks(record, "ranks", count)]
    if "scores" in stated:
        return [-score for score in fields.scores(record, "scores", count)]
    return None
