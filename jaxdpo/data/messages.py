"""Conversations: the format `messages`, and what its fields hold, each complaint with the path of what is wrong.

A part that is null counts as absent at any depth, as a field does: columns of objects fill them up with nulls.
"""

import json
from typing import Any

from jaxdpo.data import fields
from jaxdpo.data.content import Content, Messages, Unusable, best_first, shared
from jaxdpo.data.fields import Record
from jaxdpo.types import InputError

MAX_DEPTH = 64
"""Objects and lists within each other that a message or tool may have."""
_CONVERSATION = 'a list of messages, {"role": …, "content": …} each'


def messages(record: Record) -> Content:
    """A conversation and what the assistant says next, in the layouts of TRL; the first that fits is read.

    `prompt`, `chosen` and `rejected`; or the last two alone, with the prompt as the messages that they begin with, and
    `margin` as in `pairs`. `prompt` and `completions`, with `ranks` or `scores` as in `ranked`. `prompt` and
    `completion`, with a `label` as in `unpaired`, or without one to imitate it. `messages`, of which the last, the
    assistant's, is imitated. A completion begins and ends with the assistant; tool results and turns of the user in
    between belong to it. `tools` and `chat_template_kwargs` go to the chat template.

    Example:
      >>> ask = {"role": "user", "content": "2+2?"}
      >>> four, five = ({"role": "assistant", "content": text} for text in ("4", "5"))
      >>> explicit = messages({"prompt": [ask], "chosen": [four], "rejected": [five]})
      >>> explicit.prompt, explicit.completions  # doctest: +NORMALIZE_WHITESPACE
      ([{'role': 'user', 'content': '2+2?'}],
       ([{'role': 'assistant', 'content': '4'}], [{'role': 'assistant', 'content': '5'}]))
      >>> explicit == messages({"chosen": [ask, four], "rejected": [ask, five]})
      True
      >>> explicit == messages({"prompt": [ask], "completions": [[five], [four]], "scores": [0.5, 1]})
      True
      >>> messages({"prompt": [ask], "completion": [five], "label": False}).label
      False
      >>> messages({"prompt": [ask], "completion": [four]}) == messages({"messages": [ask, four]})
      True
    """
    there = fields.present(record)
    for needed, layout in LAYOUTS.items():
        if needed in there:
            return layout(record)._replace(tools=_tools(record), chat_template_kwargs=_template_kwargs(record))
    raise InputError(
        f"no conversation in the fields {sorted(record)}; allowed: 'prompt', 'chosen' and 'rejected', the last two "
        "alone, 'prompt' and 'completions', 'prompt' and 'completion', or 'messages'; rename the fields"
    )


def _compared(record: Record) -> Content:
    margin = fields.optional_number(record, "margin")
    if isinstance(record.get("prompt"), list):
        completions = tuple(_completion(field, _conversation(record, field)) for field in ("chosen", "rejected"))
        return Content(_conversation(record, "prompt"), completions, margin=margin)
    chosen, rejected = _conversation(record, "chosen"), _conversation(record, "rejected")
    end = shared(chosen[:-1], rejected[:-1])  # the last messages are left for the completions
    prompt, completions = chosen[:end], (chosen[end:], rejected[end:])
    _check_prompt_text(record, prompt)
    if not all(completion[0]["role"] == "assistant" for completion in completions):
        raise Unusable("chosen and rejected have different prompts")
    if not prompt:
        raise Unusable("chosen and rejected share no message")
    return Content(prompt, tuple(map(_completion, ("chosen", "rejected"), completions)), margin=margin)


def _ranked(record: Record) -> Content:
    several = fields.several(record, "completions", "a list of 2 lists of messages or more")
    names = [f"completions[{i}]" for i in range(len(several))]
    by_name = dict(zip(names, several, strict=True))
    completions = [_completion(name, _conversation(by_name, name)) for name in names]
    return best_first(record, _conversation(record, "prompt"), completions)


def _single(record: Record) -> Content:
    completion = _completion("completion", _conversation(record, "completion"))
    label = fields.boolean(record, "label") if "label" in fields.present(record) else None
    return Content(_conversation(record, "prompt"), (completion,), label=label)


def _imitated(record: Record) -> Content:
    conversation = _conversation(record, "messages")
    if conversation[-1]["role"] != "assistant":
        raise Unusable(f"the last message is of role {conversation[-1]['role']!r:.40}, not 'assistant'")
    if len(conversation) == 1:
        raise Unusable("nothing is said before the assistant's message")
    return Content(conversation[:-1], (_completion("messages", conversation[-1:]),))


LAYOUTS = {"chosen": _compared, "completions": _ranked, "completion": _single, "messages": _imitated}
"""The field that tells a layout -> what reads it."""


def _conversation(record: Record, field: str) -> Messages:
    fields.check_message_keys(field, record.get(field))
    values = fields.listed(record, field, _CONVERSATION)
    if not values:
        raise InputError(f"field {field!r} is an empty list; allowed: {_CONVERSATION}; fill it or delete the line")
    return [_message(f"{field}[{i}]", value) for i, value in enumerate(values)]


def _message(path: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        allowed = 'a message, {"role": …, "content": …}'
        raise InputError(f"field {path!r} is {fields.shown(value)}; allowed: {allowed}; write it as one")
    fields.check_message_keys(path, value)
    message = _without_nulls(path, value)
    message["role"] = fields.text(message, "role", within=f"{path}.")
    if isinstance(message.get("content"), list):
        message["content"] = "".join(
            _text_part(f"{path}.content[{i}]", part) for i, part in enumerate(message["content"])
        )
    elif "content" not in message and message.get("tool_calls"):
        message["content"] = None  # as the assistant that only calls a tool is written
    else:
        message["content"] = fields.text(message, "content", may_be_empty=True, within=f"{path}.")
    return message


def _text_part(path: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        got = f"of type {str(part.get('type'))!r:.40}" if isinstance(part, dict) else fields.shown(part)
        raise InputError(
            f"field {path!r} is {got}; allowed: "
            '{"type": "text", "text": …}, because the models are of text alone; leave the part or the record out'
        )
    return fields.text(part, "text", may_be_empty=True, within=f"{path}.")


def _completion(field: str, conversation: Messages) -> Messages:
    """The messages of a completion, if the assistant begins and ends it and says something."""
    for message, where in ((conversation[0], "begins"), (conversation[-1], "ends")):
        if message["role"] != "assistant":
            raise InputError(
                f"field {field!r} {where} with a message of role {message['role']!r:.40}; allowed: 'assistant'; "
                "move what comes before the assistant's first message to 'prompt', delete what follows its last"
            )
    if not any((message["content"] or "").strip() or message.get("tool_calls") for message in conversation):
        raise Unusable("a completion is empty")
    return conversation


def _check_prompt_text(record: Record, prompt: Messages) -> None:
    """Refuses a prompt in words beside whole conversations, other than one that they share anyway."""
    if "prompt" not in fields.present(record):
        return
    text = fields.text(record, "prompt", may_be_empty=True)
    if text.strip() not in {(message["content"] or "").strip() for message in prompt}:
        raise InputError(
            "field 'prompt' is a string that no message shared by 'chosen' and 'rejected' says; allowed: "
            f"{_CONVERSATION}, or what one of those says; write it as messages, or delete the field"
        )


def _tools(record: Record) -> list[dict[str, Any]] | None:
    allowed = "a list of JSON schemas of functions, or the JSON text of one"
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise InputError(f"field 'tools' is no JSON ({error}); allowed: {allowed}; correct the line") from None
    elif tools is not None:
        tools = _without_nulls("tools", tools)
    if tools is not None and not isinstance(tools, list):
        raise InputError(f"field 'tools' is {fields.shown(tools)}; allowed: {allowed}; correct the line")
    for i, tool in enumerate(tools or []):
        if not isinstance(tool, dict):
            raise InputError(
                f"field 'tools[{i}]' is {fields.shown(tool)}; allowed: the JSON schema of a function; correct the line"
            )
    return tools or None  # some templates announce tools even for an empty list


def _template_kwargs(record: Record) -> dict[str, Any] | None:
    value = record.get("chat_template_kwargs")
    if value is not None and not isinstance(value, dict):
        raise InputError(
            f"field 'chat_template_kwargs' is {fields.shown(value)}; allowed: an object, such as "
            '{"enable_thinking": false}; write it as one'
        )
    return _without_nulls("chat_template_kwargs", value) or None


def _without_nulls(path: str, value: Any, depth: int = 0) -> Any:
    """A copy without the entries of objects that are null; checks every string on the way."""
    if depth > MAX_DEPTH:
        raise InputError(f"field {path!r} is nested deeper than {MAX_DEPTH}; allowed: at most that; flatten it")
    if isinstance(value, str):
        fields.check_utf8(path, value)
    if isinstance(value, dict):
        kept = {name: part for name, part in value.items() if part is not None}
        return {name: _without_nulls(f"{path}.{name}", part, depth + 1) for name, part in kept.items()}
    if isinstance(value, list):
        return [_without_nulls(f"{path}[{i}]", part, depth + 1) for i, part in enumerate(value)]
    return value
