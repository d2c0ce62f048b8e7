r"""From one record of a data file to a prompt and its completions, best first.

A format is a function `record -> Content` and a line in `FORMATS`. It raises `InputError` where the record breaks the
format, and `Unusable` where the record is well formed but holds no preference; the caller adds file and line. Fields
that a format does not read are ignored.

>>> preference_of({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, pairs, Origin("sums.jsonl", 7)).completions
(' 4', ' 5')
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxdpo.data import fields
from jaxdpo.data.fields import Record
from jaxdpo.types import UNRANKED, InputError, Origin, Preference

ASSISTANT = "\n\nAssistant:"
"""What opens each of the assistant's turns in Anthropic's HH transcripts."""


class Unusable(Exception):
    """A well-formed record that no preference can be made from; the message is the reason it is dropped for."""


class Content(NamedTuple):
    """What a record says; the fields are those of `Preference`."""

    prompt: str
    completions: tuple[str, ...]
    ranks: tuple[int, ...] | None = None
    label: bool | None = None


Format = Callable[[Record], Content]


def pairs(record: Record) -> Content:
    """A prompt and two completions; only the prompt may be empty.

    Example:
      >>> pairs({"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "topic": "sums"})
      Content(prompt='2+2=', completions=(' 4', ' 5'), ranks=None, label=None)
    """
    prompt = fields.text(record, "prompt", may_be_empty=True)
    return Content(prompt, (fields.text(record, "chosen"), fields.text(record, "rejected")))


def hh(record: Record) -> Content:
    r"""Two whole transcripts of Anthropic's HH-RLHF, split at the last turn of the assistant.

    The prompt ends with that turn's marker; the completion keeps its leading space.

    Example:
      >>> content = hh({
      ...     "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant: Well!",
      ...     "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant: Go away.",
      ... })
      >>> content.prompt
      '\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:'
      >>> content.completions
      (' Well!', ' Go away.')
    """
    (prompt, chosen), (rejected_prompt, rejected) = _split(record, "chosen"), _split(record, "rejected")
    if prompt != rejected_prompt:
        raise Unusable("chosen and rejected have different prompts")
    return Content(prompt, (chosen, rejected))


def ranked(record: Record) -> Content:
    """A prompt and two completions or more: best first, or in any order with `ranks` or `scores`.

    `ranks` are whole numbers, lower is better, equal ones tie, and null is below the observed top k. `scores` are
    numbers, higher is better, equal ones tie. A field that is left out says nothing; both together are an error.

    Example:
      >>> ranked({"prompt": "2+2=", "completions": [" 4", " 5", " 22"]})
      Content(prompt='2+2=', completions=(' 4', ' 5', ' 22'), ranks=None, label=None)
      >>> ranked({"prompt": "2+2=", "completions": [" 5", " 4", " 22"], "scores": [0.5, 1, -3]})
      Content(prompt='2+2=', completions=(' 4', ' 5', ' 22'), ranks=None, label=None)
      >>> ranked({"prompt": "2+2=", "completions": [" 5", " 4", " four", " 22"], "ranks": [2, 1, 1, 3]})
      Content(prompt='2+2=', completions=(' 4', ' four', ' 5', ' 22'), ranks=(0, 0, 1, 2), label=None)
      >>> ranked({"prompt": "2+2=", "completions": [" 5", " 4", " 22"], "ranks": [None, 1, None]}).ranks
      (0, 2147483647, 2147483647)
    """
    prompt = fields.text(record, "prompt", may_be_empty=True)
    completions = fields.texts(record, "completions", at_least=2)
    keys = _sort_keys(record, len(completions))
    if keys is None:
        return Content(prompt, completions)
    levels = sorted(set(keys))
    if len(levels) == 1:
        raise Unusable("no completion is ranked" if levels == [math.inf] else "all completions tie")
    dense = {key: UNRANKED if key == math.inf else rank for rank, key in enumerate(levels)}
    order = sorted(range(len(keys)), key=keys.__getitem__)  # tied completions stay as they stand
    ranks = tuple(dense[keys[i]] for i in order)
    strict = ranks == tuple(range(len(ranks)))
    return Content(prompt, tuple(completions[i] for i in order), None if strict else ranks)


def unpaired(record: Record) -> Content:
    """A prompt and one completion that is good (`true`) or bad (`false`).

    Example:
      >>> unpaired({"prompt": "2+2=", "completion": " 5", "label": False})
      Content(prompt='2+2=', completions=(' 5',), ranks=None, label=False)
    """
    prompt = fields.text(record, "prompt", may_be_empty=True)
    return Content(prompt, (fields.text(record, "completion"),), label=fields.boolean(record, "label"))


FORMATS: dict[str, Format] = {
    "pairs": pairs,
    "hh": hh,
    "ranked": ranked,
    "unpaired": unpaired,
}

DETECTED_BY: dict[str, tuple[str, ...]] = {
    "pairs": ("prompt", "chosen", "rejected"),
    "ranked": ("prompt", "completions"),
    "unpaired": ("prompt", "completion", "label"),
}
"""Fields that a record must have to be taken for one of a format; `hh` is what else has two transcripts."""


def detect_format(record: Record) -> str:
    r"""Name in `FORMATS` of the format that the first record of a file is in: the one whose fields it has.

    Raises:
      InputError: if it is in none of them, or in two; the message lists the formats and the record's fields.
    Example:
      >>> detect_format({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"})
      'pairs'
      >>> detect_format({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."})
      'hh'
      >>> detect_format({"prompt": "2+2=", "completions": [" 4", " 5", " 22"]})
      'ranked'
      >>> detect_format({"prompt": "2+2=", "completion": " 5", "label": False})
      'unpaired'
    """
    fits = [name for name, needed in DETECTED_BY.items() if record.keys() >= set(needed)]
    transcripts = [record.get("chosen"), record.get("rejected")]
    if not fits and all(isinstance(text, str) and ASSISTANT in text for text in transcripts):
        return "hh"
    if len(fits) == 1:
        return fits[0]
    formats = [f"{name!r} ({', '.join(needed)})" for name, needed in DETECTED_BY.items()]
    formats.insert(1, f"'hh' (chosen, rejected: transcripts that hold {ASSISTANT!r})")
    got = f"a record with the fields {sorted(record)}; allowed: one of {', '.join(formats)}"
    if fits:
        raise InputError(f"{len(fits)} formats fit {got}; say which, in place of 'auto'")
    raise InputError(f"no format fits {got}; rename the fields to fit one")


def preference_of(record: Record, convert: Format, origin: Origin) -> Preference:
    """The preference that a record holds.

    Args:
      record: one object of the data file.
      convert: a value of `FORMATS`.
      origin: where it stands.
    Raises:
      InputError: if the record breaks the format; the message starts with its origin.
      Unusable: if a completion is blank, two completions are equal, or the format finds no preference in the record.
    """
    try:
        content = convert(record)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    if not all(completion.strip() for completion in content.completions):
        raise Unusable("a completion is empty")
    if len(set(content.completions)) < len(content.completions):
        raise Unusable("two completions are equal")
    return Preference(content.prompt, content.completions, origin, content.ranks, content.label)


def describe_dropped(dropped: Sequence[tuple[Origin, str]], *, limit: int = 10) -> str:
    """One line that counts the dropped records and names them, at most `limit`.

    Example:
      >>> describe_dropped([(Origin("a.jsonl", 87), "a completion is empty")])
      'dropped 1: row 86 (line 87): a completion is empty'
      >>> describe_dropped([(Origin("a.csv", row, "row"), "two completions are equal") for row in (3, 5, 8)], limit=1)
      'dropped 3: row 3: two completions are equal; and 2 more'
    """
    named = "; ".join(f"{origin.place}: {reason}" for origin, reason in dropped[:limit])
    more = f"; and {len(dropped) - limit} more" if len(dropped) > limit else ""
    return f"dropped {len(dropped)}{': ' if named else ''}{named}{more}"


def _split(record: Record, field: str) -> tuple[str, str]:
    """The transcript in a field, cut behind its last `ASSISTANT`."""
    before, marker, completion = fields.text(record, field).rpartition(ASSISTANT)
    if not marker:
        raise InputError(
            f"field {field!r} holds no {ASSISTANT!r}; allowed: a transcript in which the assistant speaks last; "
            "fix the line, or use the format 'pairs'"
        )
    return before + marker, completion


def _sort_keys(record: Record, count: int) -> list[float] | None:
    """By what the completions are sorted, lowest first, infinity if not ranked; None: they stand best first."""
    if "ranks" in record and "scores" in record:
        raise InputError(
            "the record has both fields 'ranks' and 'scores'; allowed: one of them, or neither where the completions "
            "stand best first; delete one"
        )
    if "ranks" in record:
        return [math.inf if rank is None else rank for rank in fields.ranks(record, "ranks", count)]
    if "scores" in record:
        return [-score for score in fields.scores(record, "scores", count)]
    return None
