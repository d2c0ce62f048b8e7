"""Prompts alone, from any source: what a model is to continue.

A record with a field `prompt` is one, whatever else it holds; any other is read in the formats that training reads, for
the prompt in it. A file whose name ends in `.txt`, and which is no JSON, has a prompt on each line.
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from jaxdpo.data import fields
from jaxdpo.data.chat import Renderer
from jaxdpo.data.content import Content, Unusable
from jaxdpo.data.encoding import encode, encoding_facts
from jaxdpo.data.fields import Record
from jaxdpo.data.files import open_content, text_lines
from jaxdpo.data.formats import FORMATS, detect_format
from jaxdpo.data.messages import messages
from jaxdpo.data.readers import no_record
from jaxdpo.data.records import Numbered, OnError, Source, raise_error
from jaxdpo.data.sources import open_sources
from jaxdpo.types import InputError, Origin

CHUNK = 256
"""Prompts that go to the tokenizer at once."""
_TEXT_NAME = re.compile(r".*\.txt(\.gz|\.zst)?", re.IGNORECASE | re.DOTALL)
_SAID = [{"role": "assistant", "content": "…"}]
"""What stands for the completion where a conversation has none yet."""


class Prompt(NamedTuple):
    """What is to be continued."""

    content: Content
    """As the record has it, without completions."""
    ids: np.ndarray
    """int32: its tokens, as training has them before a completion."""
    origin: Origin
    """Where the record stands."""


class TextLines(Source):
    """A file of plain text with a prompt on each line that is not blank."""

    unit: ClassVar[Literal["line", "row"]] = "line"

    def records(self, on_error: OnError = raise_error) -> Numbered:
        found = False
        with open_content(self.name, self.files[0]) as file:
            for number, line in text_lines(file, self.name):
                if line.strip():
                    found = True
                    yield number, {"prompt": line.rstrip("\r\n")}
        if not found:
            raise no_record(self.name)


def open_prompts(data: str) -> list[Source]:
    """The sources that `--prompts` names: as `open_sources`, and files of plain text.

    Raises:
      InputError: as `open_sources`.
    """
    return [TextLines(source.name, source.files) if _is_text(source) else source for source in open_sources(data)]


def read_prompts(data: str, tokenizer: Any, *, format: str = "auto") -> Iterator[Prompt]:
    """The prompts of data of any size, one after another.

    Args:
      data: as for `open_prompts`.
      tokenizer: a Hugging Face tokenizer; its chat template writes messages.
      format: a name in `FORMATS`, or `auto`.
    Raises:
      InputError: with file and line or row, if a record cannot be read or its prompt is empty.
    """
    facts, render = encoding_facts(tokenizer), Renderer(tokenizer)
    found = _contents(data, format)
    while chunk := list(itertools.islice(found, CHUNK)):
        texts, templated = [], []
        for content, origin in chunk:
            templated.append(not isinstance(content.prompt, str))
            try:
                texts.append(str(render(content).prompt if templated[-1] else content.prompt))
            except InputError as error:
                raise InputError(f"{origin}: {error}") from None
        for (content, origin), ids, written in zip(chunk, encode(tokenizer, texts), templated, strict=True):
            if not len(ids):
                raise InputError(
                    f"{origin}: the prompt is empty; allowed: at least one token; write something, or delete the record"
                )
            yield Prompt(content, np.concatenate(facts.start(ids, templated=written)), origin)


def prompt_of(record: Record, format: str = "auto") -> Content:
    """What of a record is to be continued, as text or as messages.

    Example:
      >>> prompt_of({"prompt": "2+2=", "chosen": " 4", "rejected": " 5"})
      Content(prompt='2+2=', completions=())
      >>> ask, say = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
      >>> prompt_of({"prompt": [ask]}) == prompt_of({"messages": [ask, say]}) == prompt_of({"messages": [ask]})
      True
    """
    there = fields.present(record)
    conversation = record.get("messages")
    if format != "auto":
        content = FORMATS[format](record)
    elif isinstance(record.get("prompt"), list):
        kept = {name: record[name] for name in ("prompt", "tools", "chat_template_kwargs") if name in there}
        content = messages(kept | {"completion": _SAID})
    elif "prompt" in there:
        content = Content(fields.text(record, "prompt", may_be_empty=True), ())
    elif isinstance(conversation, list) and conversation and _is_asked(conversation[-1]):
        content = messages({**record, "messages": conversation + _SAID})
    else:
        content = FORMATS[detect_format(record)](record)
    return content._replace(completions=(), ranks=None, label=None, margin=None)


def _is_asked(message: Any) -> bool:
    """Whether it is the assistant's turn after a message."""
    return isinstance(message, dict) and message.get("role") != "assistant"


def _contents(data: str, format: str) -> Iterator[tuple[Content, Origin]]:
    for source in open_prompts(data):
        for number, record in source.records():
            origin = Origin(source.name, number, source.unit)
            try:
                yield prompt_of(record, format), origin
            except (InputError, Unusable) as error:
                raise InputError(f"{origin}: {error}") from None


def _is_text(source: Source) -> bool:
    if len(source.files) != 1 or not _TEXT_NAME.fullmatch(source.files[0].name):
        return False
    with open_content(source.name, source.files[0]) as file:
        return file.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"[")
