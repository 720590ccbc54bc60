"""What layout rows have: found where none is declared, compared where one is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from tunesmith.config.arguments import DatasetAttr
from tunesmith.errors import DataError

Target = Literal["conversation", "document", "pair", "feedback", "prompt"]
"""What a stage needs of a row: a dialogue (sft), plain text (pt), two answers to a prompt (rm, dpo), a dialogue with a
verdict (kto), or a prompt (ppo, grpo)."""

_TURNS = ("messages", "conversations", "conversation", "dialogue")
_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("question", "answer"), ("query", "response"), ("input", "output"), ("prompt", "answer"),
)  # fmt: skip
_TEXTS = ("text", "content")
_Found = dict[str, Any]


def settle(attr: DatasetAttr, rows: Sequence[Mapping[str, Any]], target: Target) -> tuple[DatasetAttr, str]:
    """Find the layout of rows, or check the one that is declared.

    Args:
        attr: the data set; ``formatting: auto`` asks for the layout to be found.
        rows: the first readable rows.
        target: what the stage needs.

    Returns:
        The data set with its layout, and a sentence that says what was found; empty where it was declared.

    Raises:
        DataError: no layout fits, or another than the declared one does; names the entry that fits.
    """
    found = _find(rows, target)
    if attr.formatting == "auto":
        if found is None:
            raise DataError(f"{attr.dataset_name}: {_nothing(rows, target)}")
        unused = [name for name in rows[0] if name not in found.values()]
        ignored = f"; ignored columns: {', '.join(unused)}" if unused else ""
        changed = attr.model_copy(update={**_UNSET, **found})
        return changed, f"{attr.dataset_name}: {_sentence(found, target)}{ignored}"
    if not _declared_fits(attr, rows, target) and found is not None:
        raise DataError(
            f"data set {attr.dataset_name!r} declares formatting {attr.formatting}, but its rows look like "
            f"{_sentence(found, target)}. The entry that fits: {json.dumps(_entry(attr, found))}"
        )
    return attr, ""


_UNSET: _Found = {"query_column": None, "response_column": None, "system_column": None, "tools_column": None}


def _declared_fits(attr: DatasetAttr, rows: Sequence[Mapping[str, Any]], target: Target) -> bool:
    if target == "document":
        return True
    if attr.formatting == "alpaca":
        return any(attr.prompt_column in row and attr.response_column in row for row in rows)
    turns = next((row[attr.messages_column] for row in rows if attr.messages_column and attr.messages_column in row), None)
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and attr.role_tag in first


def _find(rows: Sequence[Mapping[str, Any]], target: Target) -> _Found | None:
    columns = set().union(*rows) if rows else set()
    if target == "document":
        name = next((name for name in _TEXTS if name in columns), None)
        return None if name is None else {"formatting": "text", "prompt_column": name}
    for name in _TURNS:
        value = next((row[name] for row in rows if isinstance(row.get(name), list) and row[name]), None)
        if value is not None and (tags := _tags(rows, name)) is not None:
            extra = {
                key: column for key, column in (("tools_column", "tools"), ("system_column", "system")) if column in columns
            }
            return {**tags, "messages_column": name, **extra}
    for prompt, response in _PAIRS:
        if prompt in columns and response in columns:
            found: _Found = {"formatting": "alpaca", "prompt_column": prompt, "response_column": response}
            if prompt == "instruction" and "input" in columns:
                found["query_column"] = "input"
            if "system" in columns:
                found["system_column"] = "system"
            return found
    return None


def _tags(rows: Sequence[Mapping[str, Any]], column: str) -> _Found | None:
    """Keys and speakers of the turns in a column; None where they are of no known kind."""
    turns = [turn for row in rows if isinstance(row.get(column), list) for turn in row[column] if isinstance(turn, dict)]
    if any("role" in turn for turn in turns):
        return {"formatting": "openai", "role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}  # fmt: skip
    if any("from" in turn for turn in turns):
        speakers = {turn.get("from") for turn in turns if isinstance(turn.get("from"), str)}
        human, model = ("user", "assistant") if speakers & {"user", "assistant"} else ("human", "gpt")
        return {"formatting": "sharegpt", "role_tag": "from", "content_tag": "value", "user_tag": human, "assistant_tag": model}
    return None


def _sentence(found: _Found, target: Target) -> str:
    if target == "document":
        return f"plain text in column {found['prompt_column']!r}"
    if found["formatting"] == "alpaca":
        return f"questions in {found['prompt_column']!r} with answers in {found['response_column']!r} (alpaca)"
    speakers = f"speakers {found['user_tag']}/{found['assistant_tag']} in {found['role_tag']!r}"
    tools = ", tools in 'tools'" if "tools_column" in found else ""
    return f"turns in column {found['messages_column']!r} ({found['formatting']}), {speakers}{tools}"


def _entry(attr: DatasetAttr, found: _Found) -> dict[str, Any]:
    """The entry of dataset_info.json that would have fitted."""
    columns = {key.removesuffix("_column"): value for key, value in found.items() if key.endswith("_column")}
    tags = {key: value for key, value in found.items() if key.endswith("_tag")}
    entry: dict[str, Any] = {"file_name": attr.file_name, "formatting": found["formatting"], "columns": columns}
    return {**entry, "tags": tags} if tags and found["formatting"] == "sharegpt" else entry


def _nothing(rows: Sequence[Mapping[str, Any]], target: Target) -> str:
    columns = ", ".join(map(repr, list(rows[0])[:8])) if rows else "none"
    if target == "conversation" and any(name in row for row in rows for name in _TEXTS):
        return f"the rows are plain text (columns {columns}); stage sft needs dialogues, stage pt takes text"
    wanted = "a column 'text'" if target == "document" else "messages, conversations, or a question and an answer column"
    return f"the layout of the rows cannot be told (columns {columns}), expected {wanted}; list the file in dataset_info.json"
