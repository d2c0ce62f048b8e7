"""What an audit looks for: each kind of finding with its severity and what to do about it, and the checks of one text.

A finding names records, or is about all of them. `KINDS` is the one table of what is reported, and of the thresholds.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from jaxdpo.data.transcripts import MARKERS
from jaxdpo.types import Preference

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
"""Gravest first."""


class Kind(NamedTuple):
    """One kind of finding."""

    severity: Severity
    what: str
    """What is counted."""
    fix: str
    share: float = 0.0
    """Of the records: it is only a note below this."""


KINDS: dict[str, Kind] = {
    "unreadable": Kind("error", "sources that cannot be read to their end", "correct them; the rest was not audited"),
    "broken": Kind("error", "records that break their format", "correct or delete them; training stops at the first"),
    "unusable": Kind("error", "no record is usable", "correct the data; there is nothing to train on"),
    "mixed": Kind("error", "records with a label, among others without", "make two data sets"),
    "no_shared_prompt": Kind(
        "warning",
        "records of the format implicit whose texts share no first word: the prompt is empty",
        "give the field of the prompt the name 'prompt', or begin both texts with it",
    ),
    "unread_field": Kind("note", "sources with fields that are not read", "rename what is meant to be read"),
    "dropped": Kind("warning", "dropped", "correct or delete them"),
    "one_label": Kind("warning", "labels, all alike", "add completions with the other label"),
    "duplicate": Kind("warning", "records that repeat an earlier one", "delete them, or they count twice"),
    "contradiction": Kind(
        "warning", "records that judge the completions of an earlier one otherwise", "keep the one that is right"
    ),
    "held_out_record": Kind(
        "warning", "held-out records that training has too", "delete them there, or memory is what is measured"
    ),
    "held_out_prompt": Kind("note", "held-out records with a prompt that training has too", "split by prompt"),
    # Some texts are long in every data set. One in twenty moves the lengths that a model learns, and when it ends.
    "truncated_completion": Kind("warning", "records with a completion that loses its end", "raise --max-length", 0.05),
    "truncated_prompt": Kind("warning", "records with a prompt that loses its start", "raise --max-length", 0.05),
    "role_marker": Kind(
        "warning", "records with a role marker in a completion", "cut it there, or the model learns to play the user"
    ),
    "special_token_in_completion": Kind(
        "warning", "records with the text of a special token in a completion", "delete it unless it is meant"
    ),
    "special_token_in_prompt": Kind(
        "note", "records with the text of a special token in the prompt", "right where a chat template wrote it"
    ),
    "ends_with_eos": Kind("note", "records with a completion that ends with EOS", "needless: it is added, never twice"),
    "begins_with_bos": Kind("note", "records with a prompt that begins with BOS", "needless: it is added where due"),
    # A merge across the boundary now and then is of no consequence; many come from how the prompts end.
    "boundary": Kind(
        "warning",
        "records with other tokens if prompt and completion are tokenised as one text",
        "put the space between them at the start of the completions",
        0.05,
    ),
    "prompt_ends_in_space": Kind(
        "warning", "records with a prompt that ends in a space", "put it at the start of the completions"
    ),
    "control_character": Kind("warning", "records with control characters", "delete them"),
    "replacement_character": Kind("warning", "records with U+FFFD, where text was lost", "decode the source again"),
    "invisible_character": Kind(
        "note", "records with zero-width or bidi control characters", "delete those that are not meant"
    ),
    "giveaway": Kind("warning", "pairs", "balance the data, or a loss will use it"),
}
"""Name -> what it is. The order is that of the report within a severity."""

RULES: dict[str, float] = {
    "is longer": 0.15,  # people do prefer the longer answer somewhat, in 55 to 60% of the pairs of common data sets
    "begins with white space": 0.05,  # nobody prefers white space: it tells who wrote the text, not which is better
    "ends with white space": 0.05,
    "ends with a full stop, or the like": 0.15,  # what was cut off is often worse, and often only one side was
}
"""What may tell the chosen of a pair, the length (in tokens or words) first -> how far from one half the accuracy of
that rule alone may be."""
RULE_SIGMAS = 3
"""How many standard deviations of a fair coin the pairs that a rule decides must be off one half, too."""

_SENTENCE_ENDS = tuple(".!?…。！？)]}\"'”’»`*")
_CONTROLS = {
    "control_character": "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f",
    "replacement_character": "\ufffd",
    # Joiners (U+200C, U+200D) and plain direction marks are spelling, in emoji, Persian and Hebrew: they are none.
    "invisible_character": "\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069",
}
_CONTROL = re.compile("|".join(f"(?P<{kind}>[{characters}])" for kind, characters in _CONTROLS.items()))
_ORDINARY = bytes((9, 10, 13, *range(32, 127)))


def gives_away(rule: str, chosen: float, rejected: float, pairs: float) -> bool:
    """Whether a rule that holds of so many chosen and rejected completions alone tells the sides of pairs apart."""
    lead, by_chance = abs(chosen - rejected), RULE_SIGMAS * (chosen + rejected) ** 0.5
    return lead / (2 * pairs) > RULES[rule] and lead > by_chance


def surface(text: str) -> tuple[bool, bool, bool]:
    """What the rules of `RULES` but the first say of a completion, in their order."""
    return text[:1].isspace(), text[-1:].isspace(), text.rstrip().endswith(_SENTENCE_ENDS)


def of_format(format: str, preference: Preference) -> list[str]:
    """Names in `KINDS` of what is right in one format and suspicious in another.

    Example:
      >>> from jaxdpo.types import Origin
      >>> of_format("implicit", Preference("", ("Yes.", "No."), Origin("sums.jsonl", 7)))
      ['no_shared_prompt']
    """
    return ["no_shared_prompt"] if format == "implicit" and not preference.prompt else []


class TextChecks:
    """Which kinds of findings the text of a preference has.

    Of what a chat template wrote, special tokens are not looked at: it wrote them.

    Args:
      tokenizer: a Hugging Face tokenizer, whose special tokens are looked for; None: those of no tokenizer.
    Example:
      >>> from jaxdpo.types import Origin
      >>> pair = Preference("2+2= ", ("4", "5\\n\\nHuman: why?"), Origin("sums.jsonl", 7))
      >>> sorted(TextChecks()(pair))
      ['prompt_ends_in_space', 'role_marker']
    """

    def __init__(self, tokenizer: Any = None):
        self._bos, self._eos = (tokenizer and tokenizer.bos_token) or "", (tokenizer and tokenizer.eos_token) or ""
        texts = _special_texts(tokenizer) if tokenizer is not None else []
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    def __call__(self, preference: Preference) -> set[str]:
        """Names in `KINDS`."""
        found = set(self._controls("\n".join((preference.prompt, *preference.completions))))
        completions = "\n".join(preference.completions)
        if preference.templated:
            if any(not self._special.search(marker[0]) for marker in MARKERS.finditer(completions)):
                found.add("role_marker")
            return found
        if MARKERS.search(completions):
            found.add("role_marker")
        if preference.prompt.endswith((" ", "\t", "\u00a0")):
            found.add("prompt_ends_in_space")
        return found | self._specials(preference)

    def _specials(self, preference: Preference) -> set[str]:
        found = set()
        prompt, completions = preference.prompt, preference.completions
        if self._bos and prompt.startswith(self._bos):
            found.add("begins_with_bos")
            prompt = prompt.removeprefix(self._bos)
        if self._eos and any(text.endswith(self._eos) for text in completions):
            found.add("ends_with_eos")
            completions = tuple(text.removesuffix(self._eos) for text in completions)
        if self._special.search(prompt):
            found.add("special_token_in_prompt")
        if any(map(self._special.search, completions)):
            found.add("special_token_in_completion")
        return found

    @staticmethod
    def _controls(text: str) -> Iterator[str]:
        if text.encode().translate(None, _ORDINARY):  # most texts have none but these, and this is the fastest test
            yield from (match.lastgroup or "" for match in _CONTROL.finditer(text))


def _special_texts(tokenizer: Any) -> list[str]:
    """What a tokenizer reads as a special token wherever it stands."""
    added = (str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return sorted({*map(str, tokenizer.all_special_tokens), *added} - {""})
