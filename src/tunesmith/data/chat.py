"""Lists of turns (sharegpt, OpenAI messages) -> ``Message``; tool calls and tool schemas."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.problem import RowProblem
from tunesmith.data.values import check_json, parse_json, shown, text, type_name, weight
from tunesmith.types import Message, Role, ToolCall, Tools

_T = TypeVar("_T")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn under which data keep what was thought before the answer."""
WEIGHT_KEYS = ("loss", "weight", "loss_weight")
"""Keys of a turn that say how much it is learned."""
_OTHER_KEYS = ("tool_calls", "function_call", "name", "tool_call_id")
OPENAI_ROLES: Mapping[str, Role] = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "function": "tool",
}  # fmt: skip

Speaks = Role | Literal["call"]
"""What a speaker is: a role, or ``call``: the assistant, whose text is one tool call or a list of them, as JSON."""


class Keys(NamedTuple):
    """How the turns of a data set are written.

    Attributes:
        role: key of the speaker.
        content: key of the text.
        speakers: speaker's name -> what it is.
    """

    role: str
    content: str
    speakers: Mapping[str, Speaks]


def keys_of(attr: DatasetAttr) -> Keys:
    """How ``attr`` says that turns are written."""
    speakers: dict[str, Speaks] = dict(OPENAI_ROLES) if attr.formatting == "openai" else {}
    declared: list[tuple[str, Speaks]] = [
        (attr.system_tag, "system"), (attr.observation_tag, "tool"), (attr.user_tag, "user"),
        (attr.assistant_tag, "assistant"),
    ]  # fmt: skip
    if attr.formatting != "openai":
        declared.insert(0, (attr.function_tag, "call"))
    speakers.update(declared)
    return Keys(attr.role_tag, attr.content_tag, speakers)


def read_turns(value: Any, keys: Keys, column: str, kind: str = "turn") -> list[Message]:
    """The messages of a list of turns.

    Args:
        value: the list as read.
        keys: how the turns are written.
        column: that holds the list.
        kind: what a turn is called in messages.

    Raises:
        RowProblem: no list, no turns, or a turn that cannot be read, by its number.
    """
    if not isinstance(value, list):
        fix = "Write a list of turns."
        raise RowProblem("not-turns", f"column {column!r} is {type_name(value)}, expected a list of turns", fix)
    if not value:
        raise RowProblem("no-turns", f"column {column!r} is an empty list, expected turns", "Add turns, or leave the row out.")
    return [_read_turn(turn, keys, kind, number) for number, turn in enumerate(value, 1)]


def unread_keys(turns: Any, keys: Keys) -> list[str]:
    """Keys of turns that hold something and that nobody here reads, such as ``audio``, in the order of their first turn."""
    known = {keys.role, keys.content, *REASONING_KEYS, *WEIGHT_KEYS, *_OTHER_KEYS}
    found = [
        key for turn in turns if isinstance(turn, dict) and len(turn) > 2 for key in turn if key not in known and turn[key]
    ]
    return list(dict.fromkeys(found))


def filled(content: str, code: str, message: str) -> str:
    """``content``, if there is more in it than white space. Raises RowProblem ``code``."""
    if not content or content.isspace():
        raise RowProblem(code, message, "Fill it in, or leave the row out.")
    return content


def _read_turn(turn: Any, keys: Keys, kind: str, number: int) -> Message:
    speaks = _speaks(turn, keys, kind, number)
    value = turn.get(keys.content)
    if value is None and keys.content not in turn and not (turn.get("tool_calls") or turn.get("function_call")):
        raise RowProblem("bad-turn", f"{kind} {number} has no {keys.content!r}", f"Give the turn's text as {keys.content!r}.")
    calls: tuple[ToolCall, ...] = ()
    if speaks == "call":
        calls, value = _calls_of_text(value, f"{kind} {number}"), None
        speaks = "assistant"
    content = _content(value, kind, number) if isinstance(value, list) else text(value, kind, number)
    if len(turn) > 2 or keys.content not in turn:
        message = _with_extras(turn, Message(speaks, content, tool_calls=calls), kind, number)
    else:
        message = Message(speaks, content, tool_calls=calls)
    if speaks == "assistant" and not message.tool_calls:
        filled(content, "empty-answer", f"{kind} {number}, by the assistant, is empty")
    elif speaks == "user":
        filled(content, "empty-prompt", f"{kind} {number}, by the user, is empty")
    return message


def _speaks(turn: Any, keys: Keys, kind: str, number: int) -> Speaks:
    if not isinstance(turn, dict):
        fix = f"Write it as an object with {keys.role!r} and {keys.content!r}."
        raise RowProblem("bad-turn", f"{kind} {number} is {type_name(turn)}, expected an object", fix)
    speaker = turn.get(keys.role)
    speaks = keys.speakers.get(speaker) if isinstance(speaker, str) else None
    if speaks is not None:
        return speaks
    if speaker is None:
        raise RowProblem("bad-turn", f"{kind} {number} has no {keys.role!r}", f"Name the turn's speaker as {keys.role!r}.")
    found = shown(speaker) if isinstance(speaker, str) else type_name(speaker)
    known = ", ".join(map(repr, keys.speakers))
    fix = "Rename the speaker, or name it under tags in dataset_info.json."
    raise RowProblem("unknown-speaker", f"{kind} {number} is by {found}, expected one of {known}", fix)


def _content(parts: list[Any], kind: str, number: int) -> str:
    """The text of OpenAI's list of parts."""
    texts = []
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("type"), str)):
            fix = 'Write text, or parts such as {"type": "text", "text": ...}.'
            raise RowProblem("not-text", f"{kind} {number} is a list, expected text or a list of text parts", fix)
        if part["type"] != "text":
            message = f"{kind} {number} has content of type {shown(part['type'])}, which is not text"
            raise RowProblem("not-text", message, "Leave the row out; only text is trained on.")
        texts.append(text(part.get("text"), kind, number))
    return "".join(texts)


def _with_extras(turn: Mapping[str, Any], plain: Message, kind: str, number: int) -> Message:
    """The message with what its turn says beside speaker and text. A null counts as absent, as Parquet files need."""
    reasoning = _agreed([(key, text(turn.get(key), kind, number)) for key in REASONING_KEYS if turn.get(key)], kind, number)
    calls = plain.tool_calls + _tool_calls(turn, f"{kind} {number}")
    call_id = text(turn.get("tool_call_id"), kind, number) or None
    if plain.role != "assistant" and (reasoning or calls):
        key = "reasoning" if reasoning else "tool calls"
        fix = "Move it to an assistant turn."
        raise RowProblem("misplaced-key", f"{kind} {number}, by the {plain.role}, has {key}; only the assistant can", fix)
    if plain.role != "tool" and call_id:
        fix = "Move it to the turn of the tool that answers."
        raise RowProblem("misplaced-key", f"{kind} {number}, by the {plain.role}, has a tool_call_id; only a tool can", fix)
    given = [(key, weight(turn[key], kind, number, key)) for key in WEIGHT_KEYS if turn.get(key) is not None]
    factor = _agreed(given, kind, number)
    if plain.role != "assistant" and factor:
        fix = "Remove the key, or set it to 0."
        raise RowProblem("misplaced-key", f"{kind} {number}, by the {plain.role}, has a weight; only the assistant learns", fix)
    return Message(
        plain.role,
        plain.content,
        reasoning=reasoning,
        tool_calls=calls,
        name=text(turn.get("name"), kind, number) or None,
        tool_call_id=call_id,
        weight=1.0 if factor is None or plain.role != "assistant" else factor,
    )


def _agreed(given: list[tuple[str, _T]], kind: str, number: int) -> _T | None:
    """The one value of keys that say the same thing."""
    if not given:
        return None
    for key, value in given[1:]:
        if value != given[0][1]:
            message = f"{given[0][0]!r} and {key!r} of {kind} {number} differ, although they say the same thing"
            raise RowProblem("conflicting-keys", message, "Keep one of them.")
    return given[0][1]


# ---- tools


def _calls_of_text(value: Any, where: str) -> tuple[ToolCall, ...]:
    """Sharegpt's function_call: one call or a list of them, as JSON text or as it is."""
    if isinstance(value, str):
        value = parse_json(value, f"the tool call of {where}", "bad-tool-call")
    return _calls(value if isinstance(value, list) else [value], where)


def _tool_calls(turn: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    """OpenAI's tool_calls, and the function_call that came before them."""
    calls = []
    for key in ("tool_calls", "function_call"):
        value = turn.get(key)
        if isinstance(value, str) and value:
            value = parse_json(value, f"{key!r} of {where}", "bad-tool-call")
        if value is not None and value != "":
            calls += value if isinstance(value, list) else [value]
    return _calls(calls, where) if calls else ()


def _calls(values: list[Any], where: str) -> tuple[ToolCall, ...]:
    if not values:
        raise RowProblem("bad-tool-call", f"{where} calls no function, though its speaker says so", "Name a function to call.")
    return tuple(_call(value, where) for value in values)


def _call(value: Any, where: str) -> ToolCall:
    what = f"a tool call of {where}"
    form = 'Write {"name": ..., "arguments": {...}}.'
    if not isinstance(value, dict):
        raise RowProblem("bad-tool-call", f"{what} is {type_name(value)}, expected an object", form)
    kind = value.get("type")
    if kind not in (None, "function"):
        found = shown(kind) if isinstance(kind, str) else type_name(kind)
        raise RowProblem("bad-tool-call", f"{what} is of type {found}, expected 'function'", form)
    function = value["function"] if isinstance(value.get("function"), dict) else value
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowProblem("bad-tool-call", f"{what} has no name", form)
    identity = value.get("id")
    if identity is not None and not isinstance(identity, str):
        raise RowProblem("bad-tool-call", f"the id of {what} is {type_name(identity)}, expected text", form)
    return ToolCall(text(name, "a text in", what), _arguments(function, what, form), text(identity, "a text in", what) or None)


def _arguments(function: Mapping[str, Any], what: str, form: str) -> Mapping[str, Any]:
    value = function.get("arguments")
    if isinstance(value, str):
        value = parse_json(value, f"arguments of {what}", "bad-tool-call") if value.strip() else None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RowProblem("bad-tool-call", f"arguments of {what} are {type_name(value)}, expected an object", form)
    check_json(value, what, "bad-tool-call")
    return value


def read_tools(value: Any, column: str) -> Tools:
    """Schemas of functions, as OpenAI writes them; a bare function is wrapped.

    Args:
        value: a list of schemas, one schema, either as JSON text; null or empty: no tools.
        column: that holds it.

    Raises:
        RowProblem: ``bad-tools``.
    """
    what = f"column {column!r}"
    if isinstance(value, str):
        value = parse_json(value, what, "bad-tools") if value.strip() else None
    if value is None:
        return ()
    tools = tuple(_tool(item, what) for item in (value if isinstance(value, list) else [value]))
    for tool in tools:
        check_json(tool, what, "bad-tools")
    return tools


def _tool(value: Any, what: str) -> Mapping[str, Any]:
    if isinstance(value, str):
        value = parse_json(value, f"a tool in {what}", "bad-tools")
    if isinstance(value, dict):
        function = value.get("function")
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            return value if value.get("type") is not None else {**value, "type": "function"}
        if isinstance(value.get("name"), str):
            return {"type": "function", "function": value}
    found = "an object without a name" if isinstance(value, dict) else type_name(value)
    fix = 'Write {"type": "function", "function": {"name": ..., "parameters": {...}}}.'
    raise RowProblem("bad-tools", f"a tool in {what} is {found}, expected the schema of a function", fix)
