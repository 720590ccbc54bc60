"""Raw row -> ``Conversation`` or ``Document``. With ``preference.py``, the only place that looks at a row's columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.chat import Keys, filled, keys_of, read_tools, read_turns
from tunesmith.data.problem import RowProblem
from tunesmith.data.values import text, type_name
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Document, Message, Source, Tools

OPENAI_KEYS = keys_of(DatasetAttr(dataset_name="", formatting="openai", role_tag="role", content_tag="content"))
"""How turns are written where a column of single texts holds turns all the same."""


def convert_row(
    row: Mapping[str, Any],
    attr: DatasetAttr,
    source: Source,
    default_system: str | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> Conversation:
    """Turn one row into a conversation. The order of its turns is left to the chat template.

    Args:
        row: the columns as read.
        attr: which column is what.
        source: where the row stands.
        default_system: system message for rows without one.
        placeholders: name -> text; ``{{name}}`` in any message is replaced.

    Raises:
        DataError: the data set names no column that the layout needs.
        RowProblem: a column is missing, or the row is empty or malformed.
    """
    messages = read_question(row, attr, source)
    if attr.formatting == "alpaca":
        name = required(attr.response_column, "response", attr, source)
        messages += read_answer(column(row, name, "the response", source), OPENAI_KEYS, name)
    if not any(m.role == "assistant" and m.weight > 0 for m in messages):
        raise RowProblem("no-answer", "no assistant turn to learn", "Add an answer, or leave the row out.")
    return Conversation(completed(messages, attr, default_system, placeholders), source, tools_of(row, attr))


def read_question(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> list[Message]:
    """The turns of a row but for an answer in a column of its own: in the chat layouts, all that its list of turns holds.

    Raises:
        DataError: the data set names no column that the layout needs.
        RowProblem: a column is missing, or the row is empty or malformed.
    """
    if attr.formatting == "alpaca":
        return _alpaca(row, attr, source)
    return _chat(row, attr, source, keys_of(attr))


def read_answer(value: Any, keys: Keys, name: str, what: str = "the answer") -> list[Message]:
    """The assistant's turns in a column of their own: a text, one turn, or a list of turns.

    Raises:
        RowProblem: empty, malformed, or not begun by the assistant.
    """
    if holds_turns(value):
        messages = read_turns(value if isinstance(value, list) else [value], keys, name, f"turn of {what},")
        if messages[0].role != "assistant":
            message = f"{what}, column {name!r}, begins with a turn by the {messages[0].role}, expected the assistant's"
            raise RowProblem("bad-answer", message, "Move what comes before the answer to the prompt.")
        return messages
    answer = text(value, "column", name)
    return [Message("assistant", filled(answer, "empty-answer", f"{what}, column {name!r}, is empty"))]


def holds_turns(value: Any) -> bool:
    """Whether a value is a turn or a list of turns, not a text."""
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value))


def completed(
    messages: list[Message], attr: DatasetAttr, default_system: str | None, placeholders: Mapping[str, str] | None
) -> tuple[Message, ...]:
    """The messages with what the settings add to every row."""
    if default_system is not None and messages[0].role != "system":
        messages = [Message("system", default_system), *messages]
    if attr.source_prefix:
        messages = _with_prefix(messages, attr.source_prefix)
    return with_placeholders(messages, placeholders)


def with_placeholders(messages: Sequence[Message], placeholders: Mapping[str, str] | None) -> tuple[Message, ...]:
    """The messages with each ``{{name}}`` of ``placeholders`` replaced."""
    if not placeholders:
        return tuple(messages)
    return tuple(replace(m, content=fill(m.content, placeholders)) if "{{" in m.content else m for m in messages)


def convert_document(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> Document:
    """Turn one row into a document: the text of its prompt column, or of ``text`` in a plain text file.

    Raises:
        RowProblem: the column is missing, empty or no text.
    """
    plain = source.file.removesuffix(".gz").removesuffix(".zst").endswith(".txt")
    name = "text" if plain or attr.prompt_column is None else attr.prompt_column
    content = text(column(row, name, "the text", source), "column", name)
    return Document(filled(content, "empty-text", f"column {name!r} is empty"), source)


def alternates(messages: Sequence[Message]) -> bool:
    """Whether user and assistant speak by turns, the user first; system turns aside, tools within the assistant's turn."""
    expected = "user"
    for message in messages:
        if message.role in ("system", "developer", "tool"):
            expected = "assistant" if message.role == "tool" else expected
        elif message.role != expected:
            return False
        else:
            expected = "assistant" if message.role == "user" else "user"
    return True


def fill(content: str, placeholders: Mapping[str, str]) -> str:
    """Replace each ``{{key}}`` of ``placeholders`` in ``content``."""
    for key, value in placeholders.items():
        content = content.replace("{{" + key + "}}", value)
    return content


def _with_prefix(messages: list[Message], prefix: str) -> list[Message]:
    first = next((i for i, m in enumerate(messages) if m.role == "user"), None)
    if first is None:
        raise RowProblem("no-prompt", "no user turn to put source_prefix before", "Add one, or drop source_prefix.")
    messages[first] = replace(messages[first], content=prefix + messages[first].content)
    return messages


def required(name: str | None, what: str, attr: DatasetAttr, source: Source) -> str:
    """The column of that name. Raises DataError where the data set names none."""
    if name is None:
        raise DataError(f"data set {source.dataset!r}: columns must name {what} for the {attr.formatting} layout")
    return name


def column(row: Mapping[str, Any], name: str, what: str, source: Source) -> Any:
    """The value of a column. Raises RowProblem ``missing-column``."""
    if name not in row:
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        raise RowProblem(
            "missing-column",
            f"no column {name!r} for {what}; the row has {found}",
            f"Say which column it is under columns of {source.dataset!r} in dataset_info.json.",
            unreadable=True,
        )
    return row[name]


def _system(row: Mapping[str, Any], attr: DatasetAttr) -> list[Message]:
    if attr.system_column is None or not row.get(attr.system_column):
        return []
    return [Message("system", text(row[attr.system_column], "column", attr.system_column))]


def tools_of(row: Mapping[str, Any], attr: DatasetAttr) -> Tools:
    """Functions that the model may call. Raises RowProblem ``bad-tools``."""
    return read_tools(row.get(attr.tools_column), attr.tools_column) if attr.tools_column else ()


def _alpaca(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> list[Message]:
    name = required(attr.prompt_column, "prompt", attr, source)
    value = column(row, name, "the prompt", source)
    history = _history(row.get(attr.history_column), attr.history_column) if attr.history_column else []
    if holds_turns(value):
        return [*_system(row, attr), *history, *read_turns(value if isinstance(value, list) else [value], OPENAI_KEYS, name)]
    prompt = text(value, "column", name)
    query = text(row.get(attr.query_column), "column", attr.query_column) if attr.query_column else ""
    question = filled("\n".join(part for part in (prompt, query) if part), "empty-prompt", "the prompt is empty")
    return [*_system(row, attr), *history, Message("user", question)]


def _history(value: Any, column: str) -> list[Message]:
    if value is None:
        return []
    messages = []
    for number, turn in enumerate(value if isinstance(value, list) else [None], 1):
        if not (isinstance(turn, list) and len(turn) == 2):
            message = f"column {column!r} is {type_name(value)}, expected a list of [question, answer] pairs"
            raise RowProblem("bad-history", message, "Write [[question, answer], ...].")
        question, answer = (text(part, "earlier turn", number) for part in turn)
        messages.append(Message("user", filled(question, "empty-prompt", f"earlier question {number} is empty")))
        messages.append(Message("assistant", filled(answer, "empty-answer", f"earlier answer {number} is empty")))
    return messages


def _chat(row: Mapping[str, Any], attr: DatasetAttr, source: Source, keys: Keys) -> list[Message]:
    name = required(attr.messages_column, "messages", attr, source)
    messages = read_turns(column(row, name, "the turns", source), keys, name)
    system = _system(row, attr)
    if system and messages[0].role == "system":
        if messages[0].content != system[0].content:
            message = f"the first turn and column {attr.system_column!r} are different system messages"
            raise RowProblem("conflicting-keys", message, "Keep one of them.")
        return messages
    return [*system, *messages]
