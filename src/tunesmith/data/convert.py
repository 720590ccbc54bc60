"""The only place that looks at a raw row's columns: row -> ``Conversation`` or ``Document``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.config.arguments import DatasetAttr
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Document, Message, Role, Source


class RowProblem(Exception):
    """A row that cannot be trained on; its text is the reason, counted and reported, never silent."""


def convert_row(
    row: Mapping[str, Any],
    attr: DatasetAttr,
    source: Source,
    default_system: str | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> Conversation:
    """Turn one row into a conversation.

    Args:
        row: the columns as read.
        attr: which column is what.
        source: where the row stands.
        default_system: system message for rows without one.
        placeholders: name -> text; ``{{name}}`` in any message is replaced.

    Raises:
        DataError: a column that the data set declares is missing.
        RowProblem: the row is empty or malformed.
    """
    messages = _alpaca(row, attr, source) if attr.formatting == "alpaca" else _sharegpt(row, attr, source)
    if default_system is not None and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", default_system))
    if not any(m.role == "assistant" for m in messages):
        raise RowProblem("no assistant turn")
    if any(m.role == "assistant" and not m.content.strip() for m in messages):
        raise RowProblem("empty assistant turn")
    _check_order(messages)
    if attr.source_prefix:
        messages = _with_prefix(messages, attr.source_prefix)
    if placeholders:
        messages = [Message(m.role, fill(m.content, placeholders)) for m in messages]
    return Conversation(tuple(messages), source)


def convert_document(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> Document:
    """Turn one row into a document: the text of its prompt column, or of ``text`` in a plain text file.

    Raises:
        DataError: the column is missing.
        RowProblem: it is empty or no text.
    """
    plain = source.file.endswith(".txt")
    name = "text" if plain or attr.prompt_column is None else attr.prompt_column
    text = _text(_column(row, name, "text", source), name)
    if not text.strip():
        raise RowProblem("empty text")
    return Document(text, source)


def check_columns(rows: Sequence[tuple[Mapping[str, Any], Source]], attr: DatasetAttr) -> None:
    """Raise DataError when a column that the data set declares is in none of its rows: a misspelt name, most likely."""
    for field in ("query_column", "history_column", "system_column"):
        name = getattr(attr, field)
        if name and field in attr.model_fields_set and not any(name in row for row, _ in rows):
            found = ", ".join(map(repr, list(rows[0][0])[:8]))
            raise DataError(
                f"{rows[0][1].file}: no row has the column {name!r}, which dataset_info.json declares for "
                f"{attr.dataset_name!r}; the first row has {found}"
            )


def fill(text: str, placeholders: Mapping[str, str]) -> str:
    """Replace each ``{{key}}`` of ``placeholders`` in ``text``."""
    if "{{" in text:
        for key, value in placeholders.items():
            text = text.replace("{{" + key + "}}", value)
    return text


def _check_order(messages: Sequence[Message]) -> None:
    """System first or not at all, then user and assistant by turns."""
    expected = "user"
    for number, message in enumerate(messages, 1):
        if message.role == "system":
            if number > 1:
                raise RowProblem("a system turn that is not the first")
        elif message.role != expected:
            raise RowProblem(f"turn {number} is by the {message.role}, expected the {expected}")
        else:
            expected = "assistant" if message.role == "user" else "user"


def _with_prefix(messages: list[Message], prefix: str) -> list[Message]:
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        raise RowProblem("no user turn to put source_prefix before")
    messages[first] = Message("user", prefix + messages[first].content)
    return messages


def _column(row: Mapping[str, Any], name: str, what: str, source: Source) -> Any:
    if name not in row:
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        raise DataError(
            f"{source}: no column {name!r} for the {what}; the row has {found}. "
            f"Say which column it is under columns of {source.dataset!r} in dataset_info.json"
        )
    return row[name]


def _text(value: Any, what: str) -> str:
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise RowProblem(f"{what} holds a NUL character or half of a surrogate pair")
        return value
    if value is None:
        return ""
    raise RowProblem(f"{what} is {_type_name(value)}, expected text")


def _type_name(value: Any) -> str:
    return {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "true/false"}.get(
        type(value), type(value).__name__
    )


def _alpaca(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> list[Message]:
    if attr.prompt_column is None or attr.response_column is None:
        raise DataError(f"data set {source.dataset!r}: columns must name prompt and response for the alpaca layout")
    prompt = _text(_column(row, attr.prompt_column, "prompt", source), attr.prompt_column)
    response = _text(_column(row, attr.response_column, "response", source), attr.response_column)
    query = _text(row.get(attr.query_column), attr.query_column) if attr.query_column else ""
    messages: list[Message] = []
    if attr.system_column and row.get(attr.system_column):
        messages.append(Message("system", _text(row[attr.system_column], attr.system_column)))
    messages.extend(_history(row.get(attr.history_column)) if attr.history_column else [])
    question = "\n".join(part for part in (prompt, query) if part)
    if not question.strip():
        raise RowProblem("empty prompt")
    return [*messages, Message("user", question), Message("assistant", response)]


def _history(value: Any) -> list[Message]:
    if value is None:
        return []
    messages = []
    for turn in value if isinstance(value, list) else [None]:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowProblem("history must be a list of [question, answer] pairs")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    return messages


def _sharegpt(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> list[Message]:
    if attr.messages_column is None:
        raise DataError(f"data set {source.dataset!r}: columns must name messages for the sharegpt layout")
    turns = _column(row, attr.messages_column, "turns", source)
    if not isinstance(turns, list):
        raise RowProblem(f"{attr.messages_column} is {_type_name(turns)}, expected a list of turns")
    roles: dict[str, Role] = {attr.user_tag: "user", attr.assistant_tag: "assistant", attr.system_tag: "system"}
    messages: list[Message] = []
    if attr.system_column and row.get(attr.system_column):
        messages.append(Message("system", _text(row[attr.system_column], attr.system_column)))
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or attr.role_tag not in turn or attr.content_tag not in turn:
            raise RowProblem(f"turn {number} lacks {attr.role_tag!r} or {attr.content_tag!r}")
        speaker = turn[attr.role_tag]
        role = roles.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise RowProblem(f"turn {number} is by {speaker!r}, expected one of {', '.join(map(repr, roles))}")
        messages.append(Message(role, _text(turn[attr.content_tag], f"turn {number}")))
    if not messages:
        raise RowProblem("no turns")
    return messages
