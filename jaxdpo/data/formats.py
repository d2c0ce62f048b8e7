r"""From one record of a data file to a prompt and its completions, best first.

A format is a function `record -> (prompt, completions)` and a line in `FORMATS`. It raises `InputError` where the
record breaks the format, and `Unusable` where the record is well formed but holds no preference; the caller adds file
and line. Fields that a format does not read are ignored.

>>> preference_of({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, pairs, source="sums.jsonl", line=7)
Preference(prompt='2+2=', completions=(' 4', ' 5'), source='sums.jsonl', line=7)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxdpo.types import InputError, Preference

Record = Mapping[str, Any]
Format = Callable[[Record], tuple[str, tuple[str, ...]]]

ASSISTANT = "\n\nAssistant:"
"""What opens each of the assistant's turns in Anthropic's HH transcripts."""


class Unusable(Exception):
    """A well-formed record that no preference can be made from; the message is the reason it is dropped for."""


def pairs(record: Record) -> tuple[str, tuple[str, ...]]:
    """A prompt and two completions; only the prompt may be empty.

    Example:
      >>> pairs({"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "topic": "sums"})
      ('2+2=', (' 4', ' 5'))
    """
    prompt = _text(record, "prompt", may_be_empty=True)
    return prompt, (_text(record, "chosen"), _text(record, "rejected"))


def hh(record: Record) -> tuple[str, tuple[str, ...]]:
    r"""Two whole transcripts of Anthropic's HH-RLHF, split at the last turn of the assistant.

    The prompt ends with that turn's marker; the completion keeps its leading space.

    Example:
      >>> hh({
      ...     "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant: Well!",
      ...     "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant: Go away.",
      ... })
      ('\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:', (' Well!', ' Go away.'))
    """
    (prompt, chosen), (rejected_prompt, rejected) = _split(record, "chosen"), _split(record, "rejected")
    if prompt != rejected_prompt:
        raise Unusable("chosen and rejected have different prompts")
    return prompt, (chosen, rejected)


FORMATS: dict[str, Format] = {
    "pairs": pairs,
    "hh": hh,
}


def detect_format(record: Record) -> str:
    r"""Name in `FORMATS` of the format that the first record of a file is in.

    Raises:
      InputError: if it is in none of them; the message lists the formats and the record's fields.
    Example:
      >>> detect_format({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"})
      'pairs'
      >>> detect_format({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."})
      'hh'
    """
    if "prompt" in record:
        return "pairs"
    transcripts = [record.get("chosen"), record.get("rejected")]
    if all(isinstance(text, str) and ASSISTANT in text for text in transcripts):
        return "hh"
    raise InputError(
        f"no format fits a record with the fields {sorted(record)}; allowed: 'pairs' (prompt, chosen, rejected) "
        f"and 'hh' (chosen, rejected: transcripts that hold {ASSISTANT!r}); rename the fields to fit one"
    )


def preference_of(record: Record, convert: Format, *, source: str, line: int) -> Preference:
    """The preference that a record holds.

    Args:
      record: one object of the data file.
      convert: a value of `FORMATS`.
      source: the file, for messages.
      line: its line in that file, from 1.
    Raises:
      InputError: if the record breaks the format; the message starts with file and line.
      Unusable: if a completion is blank, two completions are equal, or the format finds no preference in the record.
    """
    try:
        prompt, completions = convert(record)
    except InputError as error:
        raise InputError(f"{source}, line {line}: {error}") from None
    if not all(completion.strip() for completion in completions):
        raise Unusable("a completion is empty")
    if len(set(completions)) < len(completions):
        raise Unusable("two completions are equal")
    return Preference(prompt, completions, source, line)


def describe_dropped(dropped: Sequence[tuple[int, str]], *, limit: int = 10) -> str:
    """One line that counts the dropped lines and names them, at most `limit`.

    Example:
      >>> describe_dropped([(87, "a completion is empty"), (90, "two completions are equal")])
      'dropped 2: row 86 (line 87): a completion is empty; row 89 (line 90): two completions are equal'
      >>> describe_dropped([(line, "two completions are equal") for line in (3, 5, 8)], limit=1)
      'dropped 3: row 2 (line 3): two completions are equal; and 2 more'
    """
    named = "; ".join(f"row {line - 1} (line {line}): {reason}" for line, reason in dropped[:limit])
    more = f"; and {len(dropped) - limit} more" if len(dropped) > limit else ""
    return f"dropped {len(dropped)}{': ' if named else ''}{named}{more}"


def _text(record: Record, field: str, *, may_be_empty: bool = False) -> str:
    """The string in a field of the record, or the error that says why there is none."""
    allowed = "a string" if may_be_empty else "a string that is not empty"
    if field not in record:
        raise InputError(f"field {field!r} is missing; got the fields {sorted(record)}; allowed: {allowed}; add it")
    text = record[field]
    if not isinstance(text, str):
        raise InputError(
            f"field {field!r} is {_kind(text)}; allowed: {allowed}; write it as text, "
            "messages as the model's chat template renders them (tokenizer.apply_chat_template)"
        )
    if not text and not may_be_empty:
        raise InputError(f"field {field!r} is ''; allowed: {allowed}; fill it or delete the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer takes
        raise InputError(
            f"field {field!r} holds {text[error.start]!a}, half of a surrogate pair, at character {error.start}; "
            "allowed: text that can be written as UTF-8; delete the character"
        ) from None
    return text


def _split(record: Record, field: str) -> tuple[str, str]:
    """The transcript in a field, cut behind its last `ASSISTANT`."""
    before, marker, completion = _text(record, field).rpartition(ASSISTANT)
    if not marker:
        raise InputError(
            f"field {field!r} holds no {ASSISTANT!r}; allowed: a transcript in which the assistant speaks last; "
            "fix the line, or use the format 'pairs'"
        )
    return before + marker, completion


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a {type(value).__name__}")
