"""From messages to text: by the chat template of a tokenizer, or plainly, for eyes that have no tokenizer.

A template decides what a model reads around each message, and nothing says that it writes a conversation in such a way
that what it wrote of the prompt is where the whole conversation begins. So that is proven of every record.
"""

import inspect
import json
from typing import Any

from jaxdpo.data import fields
from jaxdpo.data.content import Content, Messages, shared
from jaxdpo.types import InputError

SHOWN = 40
"""Characters shown on either side of where two texts part."""
_LEFT_OUT = (
    "the chat template does not write tools; allowed: one that does; use the tokenizer of a model that calls tools"
)


class Renderer:
    """Writes the messages of a record as its tokenizer's chat template does; a `content.Render`.

    The prompt is the template's text of the prompt, up to and including the header of the assistant's next message. A
    completion is what the template's text of prompt and completion together has more.

    Args:
      tokenizer: a Hugging Face tokenizer; its template is asked for with the first record.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"kwargs"}

    def __call__(self, content: Content) -> Content:
        """The content with texts in place of messages.

        Raises:
          InputError: if the tokenizer has no template, the template refuses the messages or leaves out their tools, or
            the text of the prompt is not where the text of the conversation begins.
        """
        self._check_kwargs(content.chat_template_kwargs or {})
        asked = _messages(content.prompt)
        prompt = self._text(content, asked, add_generation_prompt=True)
        if content.tools and self._writes_the_same(prompt, content._replace(tools=None), asked, True):
            raise InputError(f"field 'tools' changes nothing: {_LEFT_OUT}, or drop the field")
        completions = []
        for i, completion in enumerate(content.completions):
            conversation = asked + _messages(completion)
            whole = self._text(content, conversation)
            _check_begins(whole, prompt, f"completion {i + 1} of {len(content.completions)}")
            without = [{name: message[name] for name in message if name != "tool_calls"} for message in conversation]
            if without != conversation and self._writes_the_same(whole, content, without, False):
                raise InputError(f"'tool_calls' change nothing: {_LEFT_OUT}, or write them as 'content'")
            completions.append(whole[len(prompt) :])
        return content._replace(prompt=prompt, completions=tuple(completions), tools=None, chat_template_kwargs=None)

    def _text(self, content: Content, conversation: Messages, *, add_generation_prompt: bool = False) -> str:
        if not self._tokenizer.chat_template:
            raise InputError(
                "the record holds messages, and the tokenizer has no chat template to write them as text; allowed: a "
                "tokenizer with one; pass the tokenizer of the instruct model, put a chat_template.jinja beside the "
                "tokenizer's files, or write prompt and completions as text"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                conversation,
                tools=content.tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **(content.chat_template_kwargs or {}),
            )
        except Exception as error:  # a template is a program of its own: what it does not expect can end in anything
            roles = ", ".join(str(message["role"]) for message in conversation)
            raise InputError(
                f"the chat template refuses the messages ({type(error).__name__}: {error}); got the roles "
                f"{roles:.200}; allowed: what the model was trained on; correct the messages, or use another template"
            ) from None
        fields.check_utf8("messages", text)
        return text

    def _check_kwargs(self, kwargs: dict[str, Any]) -> None:
        if taken := sorted(self._reserved & set(kwargs)):
            raise InputError(
                f"field 'chat_template_kwargs' has {taken[0]!r}; allowed: variables that the template reads; drop it"
            )

    def _writes_the_same(
        self, text: str, content: Content, conversation: Messages, add_generation_prompt: bool
    ) -> bool:
        try:
            return text == self._text(content, conversation, add_generation_prompt=add_generation_prompt)
        except InputError:
            return False


def plain(content: Content) -> Content:
    r"""The content with its messages as lines of `role: content`, for reading and counting; a `content.Render`.

    Example:
      >>> ask, say = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
      >>> plain(Content([ask], ([say],)))
      Content(prompt='user: 2+2?\n', completions=('assistant: 4\n',))
    """
    prompt, *completions = ("".join(map(_line, _messages(part))) for part in (content.prompt, *content.completions))
    return content._replace(prompt=prompt, completions=tuple(completions), tools=None, chat_template_kwargs=None)


def _messages(part: str | Messages) -> Messages:
    if isinstance(part, str):
        raise TypeError(f"{part!r:.60} is text already; only messages are rendered")
    return part


def _line(message: dict[str, Any]) -> str:
    calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]
    return f"{message['role']}: {' '.join([message['content'] or '', *calls]).strip()}\n"


def _check_begins(whole: str, prompt: str, name: str) -> None:
    """Refuses a text that does not go on from the prompt's."""
    if whole.startswith(prompt) and len(whole) > len(prompt):
        return
    if whole == prompt:
        raise InputError(
            f"{name}: the chat template writes nothing of it; allowed: one that writes what the assistant says; use "
            "the model's own chat_template.jinja, or write prompt and completions as text"
        )
    part = shared(whole, prompt)
    there, alone = (text[max(0, part - SHOWN) : part + SHOWN] for text in (whole, prompt))
    raise InputError(
        f"{name}: the chat template writes the prompt as {alone!r} when it stands alone and as {there!r} before this "
        "completion; allowed: a prompt that the conversation begins with; try chat_template_kwargs such as "
        '{"enable_thinking": false}, another chat_template.jinja, or write prompt and completions as text'
    )
