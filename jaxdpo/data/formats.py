r"""From one record of a data set to a prompt and its completions, best first.

A format is a function `record -> Content` and a line in `FORMATS`. It raises `InputError` where the record breaks the
format, and `Unusable` where the record is well formed but holds no preference; the caller adds where it stands. Fields
that a format does not read are ignored.

>>> preference_of({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"}, pairs, Origin("sums.jsonl", 7)).completions
(' 4', ' 5')
"""

from collections.abc import Callable

from jaxdpo.data import fields
from jaxdpo.data.content import Content, Format, Render, Unusable, best_first, check_comparable
from jaxdpo.data.fields import Record
from jaxdpo.data.messages import messages
from jaxdpo.data.transcripts import ASSISTANT, hh, implicit
from jaxdpo.types import InputError, Origin, Preference


def pairs(record: Record) -> Content:
    """A prompt and two completions; only the prompt may be empty.

    `margin`, a number that may be left out, is by how much `chosen` is better.

    Example:
      >>> pairs({"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "topic": "sums"})
      Content(prompt='2+2=', completions=(' 4', ' 5'))
      >>> pairs({"prompt": "2+2=", "chosen": " 4", "rejected": " 5", "margin": 1.5})
      Content(prompt='2+2=', completions=(' 4', ' 5'), margin=1.5)
    """
    prompt = fields.text(record, "prompt", may_be_empty=True)
    completions = fields.text(record, "chosen"), fields.text(record, "rejected")
    return Content(prompt, completions, margin=fields.optional_number(record, "margin"))


def ranked(record: Record) -> Content:
    """A prompt and two completions or more: best first, or in any order with `ranks` or `scores`.

    `ranks` are whole numbers, lower is better, equal ones tie, and null is below the observed top k. `scores` are
    numbers, higher is better, equal ones tie. A field that is left out says nothing; both together are an error.

    Example:
      >>> ranked({"prompt": "2+2=", "completions": [" 4", " 5", " 22"]})
      Content(prompt='2+2=', completions=(' 4', ' 5', ' 22'))
      >>> ranked({"prompt": "2+2=", "completions": [" 5", " 4", " 22"], "scores": [0.5, 1, -3]})
      Content(prompt='2+2=', completions=(' 4', ' 5', ' 22'))
      >>> ranked({"prompt": "2+2=", "completions": [" 5", " 4", " four", " 22"], "ranks": [2, 1, 1, 3]})
      Content(prompt='2+2=', completions=(' 4', ' four', ' 5', ' 22'), ranks=(0, 0, 1, 2))
      >>> ranked({"prompt": "2+2=", "completions": [" 5", " 4", " 22"], "ranks": [None, 1, None]}).ranks
      (0, 2147483647, 2147483647)
    """
    prompt = fields.text(record, "prompt", may_be_empty=True)
    return best_first(record, prompt, fields.texts(record, "completions"))


def unpaired(record: Record) -> Content:
    """A prompt and one completion that is good (`true`) or bad (`false`).

    Example:
      >>> unpaired({"prompt": "2+2=", "completion": " 5", "label": False})
      Content(prompt='2+2=', completions=(' 5',), label=False)
    """
    return completion(record)._replace(label=fields.boolean(record, "label"))


def completion(record: Record) -> Content:
    """A prompt and one completion to imitate.

    Example:
      >>> completion({"prompt": "2+2=", "completion": " 4"})
      Content(prompt='2+2=', completions=(' 4',))
    """
    prompt = fields.text(record, "prompt", may_be_empty=True)
    return Content(prompt, (fields.text(record, "completion"),))


def text(record: Record) -> Content:
    """A text to imitate, all of it.

    Example:
      >>> text({"text": "2+2=4"})
      Content(prompt='', completions=('2+2=4',))
    """
    return Content("", (fields.text(record, "text"),))


FORMATS: dict[str, Format] = {
    "pairs": pairs,
    "implicit": implicit,
    "hh": hh,
    "ranked": ranked,
    "unpaired": unpaired,
    "completion": completion,
    "text": text,
    "messages": messages,
}


def _holds_turns(record: Record) -> bool:
    """Whether both texts are transcripts of HH."""
    return all(isinstance(record[field], str) and ASSISTANT in record[field] for field in ("chosen", "rejected"))


DETECTED_BY: dict[str, tuple[set[str], set[str], Callable[[Record], bool]]] = {
    "pairs": ({"prompt", "chosen", "rejected"}, set(), lambda record: True),
    "implicit": ({"chosen", "rejected"}, {"prompt"}, lambda record: not _holds_turns(record)),
    "hh": ({"chosen", "rejected"}, {"prompt"}, _holds_turns),
    "ranked": ({"prompt", "completions"}, set(), lambda record: True),
    "unpaired": ({"prompt", "completion", "label"}, set(), lambda record: True),
    "completion": ({"prompt", "completion"}, {"label"}, lambda record: True),
    "text": ({"text"}, set(), lambda record: True),
}
"""Format of text -> the fields that a record of it has, those that it has not, and what else holds of it. The same
fields with lists in them, and `messages`, are the format `messages`."""

_COMPARED, _RANKED, _JUDGED = (
    ("chosen", "rejected", "margin"),
    ("completions", "ranks", "scores"),
    ("completion", "label"),
)
READS: dict[str, frozenset[str]] = {
    "pairs": frozenset(["prompt", *_COMPARED]),
    "implicit": frozenset(_COMPARED),
    "hh": frozenset(_COMPARED),
    "ranked": frozenset(["prompt", *_RANKED]),
    "unpaired": frozenset(["prompt", *_JUDGED]),
    "completion": frozenset(["prompt", "completion"]),
    "text": frozenset(["text"]),
    "messages": frozenset(["prompt", *_COMPARED, *_RANKED, *_JUDGED, "messages", "tools", "chat_template_kwargs"]),
}
"""Format -> all fields that it reads."""

PROMPT_NAMES = {
    *("context", "conversation", "conversations", "history", "human", "input", "instruction", "post", "problem"),
    *("prompt", "prompts", "query", "question", "system", "system_prompt", "user", "user_input", "user_prompt"),
}
"""What data sets call a prompt, or a part of one, in lower case."""
_WITHOUT_PROMPT = {
    **dict.fromkeys(("implicit", "hh"), "rename it to 'prompt'"),
    "text": "rename it to 'prompt' and 'text' to 'completion'",
}
"""Format that reads no field of a prompt -> what to do where there is one."""


def detect_format(record: Record) -> str:
    r"""Name in `FORMATS` of the format that the first record of a source is in: the one whose fields it has.

    Raises:
      InputError: if it is in none of them, or in two; the message lists the formats and the record's fields. Also if a
        field that the format does not read has the name of a prompt, or messages are in the words of ShareGPT.
    Example:
      >>> detect_format({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"})
      'pairs'
      >>> detect_format({"chosen": "2+2=4", "rejected": "2+2=5"})
      'implicit'
      >>> detect_format({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go."})
      'hh'
      >>> detect_format({"prompt": "2+2=", "completions": [" 4", " 5", " 22"]})
      'ranked'
      >>> detect_format({"prompt": "2+2=", "completion": " 5", "label": False})
      'unpaired'
      >>> detect_format({"prompt": "2+2=", "completion": " 4", "label": None})
      'completion'
      >>> detect_format({"text": "2+2=4"})
      'text'
      >>> detect_format({"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]})
      'messages'
    """
    there = fields.present(record)
    fits: dict[str, None] = {"messages": None} if "messages" in there else {}
    for name, (needed, absent, holds) in DETECTED_BY.items():
        if there >= needed and not there & absent and holds(record):
            fits["messages" if any(_is_conversation(record[field]) for field in needed) else name] = None
    if len(fits) == 1:
        (name,) = fits
        for field in filter(READS[name].__contains__, record):
            fields.check_message_keys(field, record[field])
        _check_no_prompt_is_left(record, name)
        return name
    rows = [f"{name!r} ({', '.join(sorted(needed))})" for name, (needed, _, _) in DETECTED_BY.items()]
    got = f"a record with the fields {sorted(record)}; allowed: one of {', '.join(rows)}, 'messages' (messages, or "
    got += "messages in the fields of one of the others)"
    if fits:
        raise InputError(f"{len(fits)} formats fit, {', '.join(map(repr, fits))}, {got}; say which, in place of 'auto'")
    for field in record:
        fields.check_message_keys(field, record[field])
    raise InputError(f"no format fits {got}; rename the fields to fit one")


def _check_no_prompt_is_left(record: Record, name: str) -> None:
    """Refuses a format without a field for the prompt where the record seems to have one."""
    left = [field for field in record if isinstance(record[field], str | list) and field.lower() in PROMPT_NAMES]
    if left and name in _WITHOUT_PROMPT:
        raise InputError(
            f"{' and '.join(map(repr, left))} may hold the prompt, which the format {name!r} would leave out; got the "
            f"fields {sorted(record)}; allowed: the whole prompt in the field 'prompt', or none; "
            f"{_WITHOUT_PROMPT[name]}, or give --format {name}"
        )


def preference_of(
    record: Record, convert: Format, origin: Origin, render: Render | None = None, *, compared: bool = True
) -> Preference:
    """The preference that a record holds.

    Args:
      record: one record of a source.
      convert: a value of `FORMATS`.
      origin: where it stands.
      render: turns messages into texts: a `chat.Renderer`, or `chat.plain`.
      compared: whether completions are compared, and so have to differ; otherwise one is imitated, or each is scored.
    Raises:
      InputError: if the record breaks the format or cannot be rendered; the message starts with its origin.
      Unusable: if a completion is blank, the format finds no preference in the record, or, where they are compared, two
        completions are equal or all tie.
    """
    try:
        content = convert(record)
        if templated := not isinstance(content.prompt, str):
            content = _rendered(content, render)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    prompt, *completions = (str(part) for part in (content.prompt, *content.completions))
    if not all(completion.strip() for completion in completions):
        raise Unusable("a completion is empty")
    if compared:
        check_comparable(content)
    return Preference(
        prompt, tuple(completions), origin, content.ranks, content.label, content.margin, templated=templated
    )


def _rendered(content: Content, render: Render | None) -> Content:
    if render is None:
        raise InputError(
            "the record holds messages, and there is no chat template to write them as text; allowed: text; "
            "pass render=Renderer(tokenizer)"
        )
    return render(content)


def _is_conversation(value: object) -> bool:
    """Whether a field holds messages, or lists of them; or a single one, which is to be written as a list."""
    if isinstance(value, dict):
        return "role" in value
    return isinstance(value, list) and any(isinstance(part, dict | list) for part in value)
