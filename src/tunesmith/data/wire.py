"""Messages in the two forms around a chat template: what a program hands over, and what a template reads.

Templates read plain mappings in OpenAI's form, and differ in what they can take: arguments of a tool call as a
mapping or as JSON text, no content or an empty one beside tool calls, content as text or as a list of parts. ``Form``
says which; ``data/template.py`` finds it out by trying.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.data.trace import TOOLS, TracedStr, trace
from tunesmith.errors import TemplateError
from tunesmith.types import Message, Role, ToolCall, Tools

CONTENT, REASONING, CALLS, OTHER = range(4)
"""Parts of a message that are traced apart."""
FIELDS = 4
"""How many they are: the text of part ``p`` of message ``i`` has the origin ``FIELDS * i + p``."""

_ROLES: tuple[Role, ...] = ("system", "developer", "user", "assistant", "tool")
_KEYS = {"role", "content", "reasoning_content", "reasoning", "thinking", "tool_calls", "name", "tool_call_id", "weight"}


@dataclass(frozen=True, slots=True)
class Form:
    """How a template wants its messages.

    Attributes:
        arguments_as_text: arguments of tool calls as JSON text, not as a mapping.
        no_content: leave the content out where it is empty beside tool calls.
        content_as_parts: content as ``[{"type": "text", "text": ...}]``.
        reasoning_key: a name for the reasoning that this template alone reads, beside the usual ones.
    """

    arguments_as_text: bool = False
    no_content: bool = False
    content_as_parts: bool = False
    reasoning_key: str | None = None


def owner(origin: int) -> int:
    """Number of the message that text of this origin comes from; negative for tools and marks."""
    return origin // FIELDS if origin >= 0 else origin


def plain_messages(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """Messages as a template reads them."""
    return [_plain(message, form) for message in messages]


def _plain(message: Message, form: Form) -> dict[str, Any]:
    if message.reasoning is None and not message.tool_calls and message.name is None and message.tool_call_id is None:
        if form.content_as_parts:
            return {"role": message.role, "content": [{"type": "text", "text": message.content}]}
        return {"role": message.role, "content": message.content}
    return _assemble(
        message.role,
        message.content,
        message.reasoning,
        [_call(call, form.arguments_as_text) for call in message.tool_calls],
        {"name": message.name, "tool_call_id": message.tool_call_id},
        form,
    )


def traced_messages(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """Messages as a template reads them, every text with its origin."""
    traced = []
    for index, message in enumerate(messages):
        base = FIELDS * index
        reasoning = message.reasoning
        calls = [_call(call, form.arguments_as_text) for call in message.tool_calls]
        traced.append(
            _assemble(
                message.role,
                TracedStr.of(message.content, base + CONTENT),
                None if reasoning is None else TracedStr.of(reasoning, base + REASONING),
                [_traced_call(call, base + CALLS) for call in calls],
                {
                    "name": trace(message.name, base + OTHER),
                    "tool_call_id": trace(message.tool_call_id, base + OTHER),
                },
                form,
            )
        )
    return traced


def _assemble(
    role: Role, content: str, reasoning: str | None, calls: list[dict[str, Any]], other: dict[str, Any], form: Form
) -> dict[str, Any]:
    """One message; the reasoning stands under the names that transformers gives it."""
    wired: dict[str, Any] = {"role": role}
    if reasoning is not None:
        wired = {"thinking": reasoning, "role": role}
        if form.reasoning_key:
            wired[form.reasoning_key] = reasoning
    if content or not (calls and form.no_content):
        wired["content"] = [{"type": "text", "text": content}] if form.content_as_parts else content
    if calls:
        wired["tool_calls"] = calls
    wired.update({key: value for key, value in other.items() if value is not None})
    if reasoning is not None:
        wired["reasoning_content"] = reasoning
    return wired


def _call(call: ToolCall, as_text: bool) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False) if as_text else thaw(call.arguments)
    wired = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return wired if call.id is None else {"id": call.id, **wired}


def _traced_call(call: dict[str, Any], origin: int) -> dict[str, Any]:
    traced = {key: trace(value, origin) for key, value in call.items() if key not in ("type", "function")}
    return {**traced, "type": call["type"], "function": {k: trace(v, origin) for k, v in call["function"].items()}}


def thaw(value: Any) -> Any:
    """Plain, changeable copies of mappings and sequences."""
    if isinstance(value, Mapping):
        return {key: thaw(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [thaw(item) for item in value]
    return value


def plain_tools(tools: Tools) -> list[Any] | None:
    """Tools as a template reads them; None if there are none."""
    return [thaw(tool) for tool in tools] or None


def traced_tools(tools: Tools) -> list[Any] | None:
    """Tools as a template reads them, every text with its origin."""
    return [trace(tool, TOOLS) for tool in tools] or None


def packed(messages: Sequence[Message], tools: Tools) -> str:
    """Messages and tools as JSON text, from which ``unpacked`` makes the same again; nothing of nothing."""
    if not messages:
        return ""
    wired = plain_messages(messages, Form())
    for mapping, message in zip(wired, messages, strict=True):
        mapping["weight"] = message.weight
    return json.dumps([wired, [thaw(tool) for tool in tools]], ensure_ascii=False, default=str)


def unpacked(text: str) -> tuple[tuple[Message, ...], Tools]:
    """What ``packed`` was given."""
    wired, tools = json.loads(text) if text else ((), ())
    return tuple(as_messages(wired)), tuple(tools)


def as_messages(given: Sequence[Message | Mapping[str, Any]]) -> list[Message]:
    """Messages from messages or from mappings in OpenAI's form.

    Raises:
        TemplateError: a mapping has a key, role or value that cannot be shown; names message and key.
    """
    return [m if isinstance(m, Message) else _message(m, number) for number, m in enumerate(given, 1)]


def _message(given: Mapping[str, Any], number: int) -> Message:
    place = f"message {number}"
    if not isinstance(given, Mapping):
        raise TemplateError(f"{place} is a {type(given).__name__}, expected a mapping with role and content")
    if unknown := [key for key, value in given.items() if key not in _KEYS and value is not None]:
        raise TemplateError(f"{place} has the key {unknown[0]!r}, expected only {', '.join(sorted(_KEYS))}")
    role = given.get("role")
    if role not in _ROLES:
        raise TemplateError(f"{place} has the role {role!r}, expected one of {', '.join(_ROLES)}")
    reasoning = [given[key] for key in ("reasoning_content", "thinking", "reasoning") if given.get(key) is not None]
    return Message(
        role=role,
        content=_content(given.get("content"), place),
        reasoning=_optional_text(reasoning[0] if reasoning else None, place, "reasoning_content"),
        tool_calls=_calls(given.get("tool_calls"), place),
        name=_optional_text(given.get("name"), place, "name"),
        tool_call_id=_optional_text(given.get("tool_call_id"), place, "tool_call_id"),
        weight=_weight(given.get("weight"), place),
    )


def _weight(value: Any, place: str) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise TemplateError(f"{place}: weight is {value!r}, expected a number of at least 0")
    return float(value)


def _optional_text(value: Any, place: str, key: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TemplateError(f"{place}: {key} is a {type(value).__name__}, expected text")
    return value


def _content(value: Any, place: str) -> str:
    """Text, or the texts of a list of parts one after the other."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise TemplateError(f"{place}: content is a {type(value).__name__}, expected text or a list of text parts")
    texts = []
    for part in value:
        if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise TemplateError(f"{place}: content has a part of type {kind!r}, only text parts can be trained on")
        texts.append(part["text"])
    return "".join(texts)


def _calls(value: Any, place: str) -> tuple[ToolCall, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise TemplateError(f"{place}: tool_calls is a {type(value).__name__}, expected a list")
    return tuple(call if isinstance(call, ToolCall) else _tool_call(call, place) for call in value)


def _tool_call(call: Any, place: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"{place}: a tool call has no function with a name")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise TemplateError(f"{place}: the arguments of {function['name']!r} are no JSON: {error}") from None
    if not isinstance(arguments, Mapping):
        raise TemplateError(f"{place}: the arguments of {function['name']!r} are no mapping of names to values")
    return ToolCall(function["name"], arguments, _optional_text(call.get("id"), place, "the id of a tool call"))
