r"""Formats whose two completions are whole texts that hold the prompt: where they are split.

The prompt ends where the assistant begins to speak, and the completion keeps the white space that it begins with.
"""

import re

from jaxdpo.data import fields
from jaxdpo.data.content import Content, Unusable, shared
from jaxdpo.data.fields import Record
from jaxdpo.types import InputError

ASSISTANT = "\n\nAssistant:"
"""What opens each of the assistant's turns in Anthropic's HH transcripts."""

_ASSISTANTS = (
    r"^(?:Assistant|AI|Bot|### ?(?:Assistant|Response)):",
    r"<\|im_start\|>assistant\n",
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    r"<start_of_turn>model\n",
    r"<\|assistant\|>\n?",
    r"\[/INST\]",
)
_OTHERS = (
    r"^(?:Human|User|System|### ?(?:Human|User|System|Instruction|Input)):",
    r"<\|im_start\|>(?:system|user|tool)\n",
    r"<\|start_header_id\|>(?:system|user|ipython|tool)<\|end_header_id\|>\n\n",
    r"<start_of_turn>user\n",
    r"<\|(?:system|user)\|>\n?",
    r"\[INST\]",
)
MARKERS = re.compile(f"(?P<assistant>{'|'.join(_ASSISTANTS)})|{'|'.join(_OTHERS)}", re.MULTILINE)
"""What opens a turn: a speaker at the start of a line, or the header that a chat template writes."""


def hh(record: Record) -> Content:
    r"""Two whole transcripts of Anthropic's HH-RLHF, split at the last turn of the assistant.

    The prompt ends with that turn's marker; the completion keeps its leading space. `margin` is as in `pairs`.

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
    (prompt, chosen), (rejected_prompt, rejected) = _split_hh(record, "chosen"), _split_hh(record, "rejected")
    if prompt != rejected_prompt:
        raise Unusable("chosen and rejected have different prompts")
    return Content(prompt, (chosen, rejected), margin=fields.optional_number(record, "margin"))


def implicit(record: Record) -> Content:
    r"""Two texts that begin with the same prompt, which is split off where it must end.

    With markers of turns (`MARKERS`) in what both share, behind the last of them: there the assistant begins to speak.
    Without any, where the last shared word ends; no word is ever cut. The completion keeps the spaces that it begins
    with, the prompt the newlines that it ends in. One text may be the beginning of the other; both completions hold at
    least their last word. `margin` is as in `pairs`.

    Splitting too early costs nothing: what both completions begin with has the same log-probability in both, which
    cancels in every loss of their difference.

    Example:
      >>> implicit({"chosen": "The sky is blue.", "rejected": "The sky is black."})
      Content(prompt='The sky is', completions=(' blue.', ' black.'))
      >>> implicit({"chosen": "What is 2+2?\nFour", "rejected": "What is 2+2?\nFive"})
      Content(prompt='What is 2+2?\n', completions=('Four', 'Five'))
      >>> implicit({"chosen": "User: 2+2?\nAssistant: It is 4", "rejected": "User: 2+2?\nAssistant: It is 5"})
      Content(prompt='User: 2+2?\nAssistant:', completions=(' It is 4', ' It is 5'))
      >>> implicit({"chosen": "The sky is blue", "rejected": "The sky is blue today"})
      Content(prompt='The sky is', completions=(' blue', ' blue today'))
      >>> implicit({"chosen": "Yes.", "rejected": "No."})
      Content(prompt='', completions=('Yes.', 'No.'))
    """
    chosen, rejected = fields.text(record, "chosen"), fields.text(record, "rejected")
    alike = shared(chosen, rejected)
    markers = list(MARKERS.finditer(chosen[:alike]))
    if markers and not markers[-1]["assistant"]:
        raise Unusable("chosen and rejected have different prompts")
    end = markers[-1].end() if markers else _last_word_end(chosen, rejected, alike)
    return Content(chosen[:end], (chosen[end:], rejected[end:]), margin=fields.optional_number(record, "margin"))


def _split_hh(record: Record, field: str) -> tuple[str, str]:
    """The transcript in a field, cut behind its last `ASSISTANT`."""
    before, marker, completion = fields.text(record, field).rpartition(ASSISTANT)
    if not marker:
        raise InputError(
            f"field {field!r} holds no {ASSISTANT!r}; allowed: a transcript in which the assistant speaks last; "
            "fix the line, or use the format 'pairs' or 'implicit'"
        )
    return before + marker, completion


def _last_word_end(first: str, second: str, alike: int) -> int:
    """The last index, `alike` at most, where no word of either text is cut and something but space is left of both."""
    end = min(alike, len(first.rstrip()) - 1, len(second.rstrip()) - 1)
    while end > 0 and not (_between_words(first, end) and _between_words(second, end)):
        end -= 1
    return max(end, 0)


def _between_words(text: str, index: int) -> bool:
    """Whether a line begins at an index, or the white space between two words of one line does."""
    before, after = text[index - 1], text[index]
    return before == "\n" or (after.isspace() and not before.isspace())
