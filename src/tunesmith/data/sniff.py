"""What layout rows have: found where none is declared, compared where one is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.values import verdict
from tunesmith.errors import DataError

Target = Literal["conversation", "document", "pair", "feedback", "prompt"]
"""What a stage needs of a row: a dialogue (sft), plain text (pt), two answers to a prompt (rm, dpo), a dialogue with a
verdict (kto), or a prompt (ppo, grpo, prediction)."""

_TURNS = ("messages", "conversations", "conversation", "dialogue")
_PAIRS = (
    ("instruction", "output"), ("instruction", "response"), ("prompt", "completion"), ("prompt", "response"),
    ("question", "answer"), ("query", "response"), ("input", "output"), ("prompt", "answer"),
)  # fmt: skip
_QUESTIONS = ("instruction", "prompt", "question", "query", "input")
_VERDICTS = ("kto_tag", "label", "desirable")
_TEXTS = ("text", "content")
_Rows = Sequence[Mapping[str, Any]]
_Found = dict[str, Any]

_NEEDED: Mapping[Target, str] = {
    "conversation": "messages, conversations, or a question and an answer column",
    "document": "a column 'text'",
    "pair": "columns 'chosen' and 'rejected', with a prompt or as whole conversations",
    "feedback": "a dialogue and a column 'label' or 'kto_tag' that is true or false",
    "prompt": "messages, conversations, or a question column",
}
_STAGES: Mapping[Target, str] = {
    "conversation": "dialogues, which stage sft takes",
    "document": "plain text, which stage pt takes",
    "pair": "preference pairs, which reward models and preference stages take",
    "feedback": "dialogues with a verdict, which stage kto takes",
}


def settle(attr: DatasetAttr, rows: _Rows, target: Target) -> tuple[DatasetAttr, str]:
    """Find the layout of rows, or check the one that is declared.

    Args:
        attr: the data set; ``formatting: auto`` asks for the layout to be found.
        rows: the first readable rows.
        target: what the stage needs.

    Returns:
        The data set with its layout, and a sentence that says what was found; empty where it was declared.

    Raises:
        DataError: no layout fits, another than the declared one does (names the entry that fits), or the rows are for
            another stage.
    """
    found = _FINDERS[target](rows)
    if attr.formatting == "auto":
        if found is None:
            raise DataError(f"{attr.dataset_name}: {_nothing(rows, target)}")
        unused = [name for name in rows[0] if name not in found.values()]
        ignored = f"; ignored columns: {', '.join(unused)}" if unused else ""
        changed = attr.model_copy(update={**_UNSET, **found})
        return changed, f"{attr.dataset_name}: {_sentence(found, target)}{ignored}"
    _check_kind(attr, target)
    if not _declared_fits(attr, rows, target):
        declares = f"data set {attr.dataset_name!r} declares formatting {attr.formatting}, but"
        if found is not None:
            fitting = json.dumps(_entry(attr, found))
            raise DataError(f"{declares} its rows look like {_sentence(found, target)}. The entry that fits: {fitting}")
        if other := _of_another_kind(rows, target):
            raise DataError(f"{declares} {other}")
    return attr, ""


_UNSET: _Found = dict.fromkeys(
    ("query_column", "response_column", "system_column", "tools_column", "messages_column", "chosen_column", "rejected_column")
)


# ---- what is declared


def _check_kind(attr: DatasetAttr, target: Target) -> None:
    """Refuse rows of one kind in a stage that learns from another: it would learn the wrong thing without a word."""
    where = f"data set {attr.dataset_name!r}"
    if target == "pair" and not attr.ranking:
        raise DataError(f"{where} is not declared as pairs; add ranking: true and name the columns chosen and rejected")
    if target == "feedback" and attr.kto_tag_column is None:
        raise DataError(f"{where} has no verdicts; name the column that holds them as kto_tag under columns")
    if target == "conversation" and attr.ranking:
        raise DataError(
            f"{where} holds preference pairs (ranking: true), of which stage sft would have to choose an answer; to learn "
            "the better one, list the file again without ranking, its column named as response"
        )
    if target == "conversation" and attr.kto_tag_column is not None:
        raise DataError(
            f"{where} holds verdicts (kto_tag), and stage sft would learn the bad answers too; to learn all the same, list "
            "the file again without kto_tag"
        )


def _declared_fits(attr: DatasetAttr, rows: _Rows, target: Target) -> bool:
    if target == "document":
        return True
    if target == "pair" and attr.chosen_column:
        if not any(attr.chosen_column in row and attr.rejected_column in row for row in rows):
            return False
        if attr.formatting != "alpaca" and attr.messages_column is None:
            return True
    if attr.formatting == "alpaca":
        answered = target in ("pair", "prompt") and (target == "prompt" or attr.chosen_column is not None)
        return any(attr.prompt_column in row and (answered or attr.response_column in row) for row in rows)
    turns = next((row[attr.messages_column] for row in rows if attr.messages_column and attr.messages_column in row), None)
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and attr.role_tag in first


# ---- what is found


def _find_document(rows: _Rows) -> _Found | None:
    name = _named(rows, _TEXTS)
    return None if name is None else {"formatting": "text", "prompt_column": name}


def _find_conversation(rows: _Rows) -> _Found | None:
    return _find_turns(rows) or _find_columns(rows)


def _find_turns(rows: _Rows) -> _Found | None:
    """A column of turns, the better known names first."""
    for name in _TURNS:
        if any(isinstance(row.get(name), list) and row[name] for row in rows) and (tags := _tags(rows, name)) is not None:
            return {**tags, "messages_column": name, **_beside(rows, "tools", "system")}
    return None


def _find_columns(rows: _Rows) -> _Found | None:
    """A question and an answer in columns of their own."""
    columns = _columns(rows)
    for prompt, response in _PAIRS:
        if prompt in columns and response in columns:
            return {
                "formatting": "alpaca",
                "prompt_column": prompt,
                "response_column": response,
                **_beside_question(rows, prompt),
            }
    return None


def _find_question(rows: _Rows) -> _Found | None:
    name = _named(rows, _QUESTIONS)
    return None if name is None else {"formatting": "alpaca", "prompt_column": name, **_beside_question(rows, name)}


def _find_prompt(rows: _Rows) -> _Found | None:
    return _find_conversation(rows) or _find_question(rows)


def _find_feedback(rows: _Rows) -> _Found | None:
    found = _find_conversation(rows)
    label = next((name for name in _VERDICTS if any(verdict(row.get(name)) is not None for row in rows)), None)
    return None if found is None or label is None else {**found, "kto_tag_column": label}


def _find_pair(rows: _Rows) -> _Found | None:
    columns = _columns(rows)
    question = _find_turns(rows)
    if not {"chosen", "rejected"} <= columns:
        found = _find_columns(rows) if question is None else None
        two = found is not None and any(_is_two(row.get(found["response_column"])) for row in rows)
        return {**found, "ranking": True} if found is not None and two else None
    answers = {"ranking": True, "chosen_column": "chosen", "rejected_column": "rejected"}
    tags = _tags(rows, "chosen")
    if question is not None:
        return {**question, **answers}
    if tags is not None and _begins_with_question(rows, tags):
        return {**tags, "messages_column": None, **answers, **_beside(rows, "tools", "system")}
    found = _find_question(rows)
    return None if found is None else {**found, **answers}


_FINDERS: Mapping[Target, Callable[[_Rows], _Found | None]] = {
    "document": _find_document, "conversation": _find_conversation, "prompt": _find_prompt, "feedback": _find_feedback,
    "pair": _find_pair,
}  # fmt: skip


def _columns(rows: _Rows) -> set[str]:
    return set().union(*rows) if rows else set()


def _named(rows: _Rows, names: Sequence[str]) -> str | None:
    columns = _columns(rows)
    return next((name for name in names if name in columns), None)


def _beside(rows: _Rows, *names: str) -> _Found:
    columns = _columns(rows)
    return {f"{name}_column": name for name in names if name in columns}


def _beside_question(rows: _Rows, prompt: str) -> _Found:
    query = {"query_column": "input"} if prompt == "instruction" and "input" in _columns(rows) else {}
    return {**query, **_beside(rows, "system")}


def _is_two(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(answer, str) for answer in value)


def _turns(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _begins_with_question(rows: _Rows, tags: _Found) -> bool:
    first = next((turns[0] for row in rows if (turns := _turns(row.get("chosen"))) and isinstance(turns[0], dict)), {})
    return first.get(tags["role_tag"]) != tags["assistant_tag"]


def _tags(rows: _Rows, column: str) -> _Found | None:
    """Keys and speakers of the turns in a column; None where they are of no known kind."""
    turns = [turn for row in rows for turn in _turns(row.get(column)) if isinstance(turn, dict)]
    if any("role" in turn for turn in turns):
        return {"formatting": "openai", "role_tag": "role", "content_tag": "content", "user_tag": "user",
                "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}  # fmt: skip
    if any("from" in turn for turn in turns):
        speakers = {turn.get("from") for turn in turns if isinstance(turn.get("from"), str)}
        human, model = ("user", "assistant") if speakers & {"user", "assistant"} else ("human", "gpt")
        return {"formatting": "sharegpt", "role_tag": "from", "content_tag": "value", "user_tag": human, "assistant_tag": model}
    return None


# ---- in words


def _sentence(found: _Found, target: Target) -> str:
    if target == "document":
        return f"plain text in column {found['prompt_column']!r}"
    parts = []
    if found["formatting"] == "alpaca":
        answers = f" with answers in {found['response_column']!r}" if found.get("response_column") else ""
        parts.append(f"questions in {found['prompt_column']!r}{answers} (alpaca)")
    else:
        speakers = f"speakers {found['user_tag']}/{found['assistant_tag']} in {found['role_tag']!r}"
        where = f"turns in column {found['messages_column']!r}" if found["messages_column"] else "whole conversations"
        parts.append(f"{where} ({found['formatting']}), {speakers}")
    if found.get("chosen_column"):
        parts.append(f"the better answer in {found['chosen_column']!r}, the worse in {found['rejected_column']!r}")
    if found.get("kto_tag_column"):
        parts.append(f"verdicts in {found['kto_tag_column']!r}")
    if "tools_column" in found:
        parts.append("tools in 'tools'")
    return ", ".join(parts)


def _entry(attr: DatasetAttr, found: _Found) -> dict[str, Any]:
    """The entry of dataset_info.json that would have fitted."""
    columns = {key.removesuffix("_column"): value for key, value in found.items() if key.endswith("_column") and value}
    tags = {key: value for key, value in found.items() if key.endswith("_tag")}
    entry: dict[str, Any] = {"file_name": attr.file_name, "formatting": found["formatting"], "columns": columns}
    if found.get("ranking"):
        entry["ranking"] = True
    return {**entry, "tags": tags} if tags and found["formatting"] == "sharegpt" else entry


def _listed(rows: _Rows) -> str:
    return ", ".join(map(repr, list(rows[0])[:8])) if rows else "none"


def _of_another_kind(rows: _Rows, target: Target) -> str:
    """That the rows are what another stage takes; empty where they are not."""
    for other in ("pair", "feedback", "conversation", "document"):
        if other != target and _FINDERS[other](rows) is not None:
            return f"the rows are {_STAGES[other]} (columns {_listed(rows)}); what is needed here is {_NEEDED[target]}"
    return ""


def _nothing(rows: _Rows, target: Target) -> str:
    wanted = f"expected {_NEEDED[target]}; list the file in dataset_info.json"
    return _of_another_kind(rows, target) or f"the layout of the rows cannot be told (columns {_listed(rows)}), {wanted}"
