"""Raw row -> ``PreferencePair``, ``Feedback`` or ``Prompt``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.chat import keys_of, read_turns
from tunesmith.data.convert import (
    OPENAI_KEYS,
    column,
    completed,
    convert_row,
    holds_turns,
    read_answer,
    read_question,
    required,
    tools_of,
    with_placeholders,
)
from tunesmith.data.problem import RowProblem
from tunesmith.data.values import number, text, type_name, verdict
from tunesmith.types import Feedback, Message, PreferencePair, Prompt, Source

_SIDES = ("the better answer", "the worse answer")


def convert_pair(
    row: Mapping[str, Any],
    attr: DatasetAttr,
    source: Source,
    default_system: str | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> PreferencePair:
    """Turn one row into a pair.

    The answers stand in two columns (a text, a turn, or a list of turns each), or as a list of two texts in the response
    column of the alpaca layout. Where no column of turns is declared, the two columns hold whole conversations, and what
    they have in common at the start is the prompt.

    Args, raises: as ``convert_row``.
    """
    if attr.formatting != "alpaca" and attr.messages_column is None:
        question, better, worse = _parted(row, attr, source)
    else:
        question = read_question(row, attr, source)
        better, worse = _answers(row, attr, source)
    for answer, what in zip((better, worse), _SIDES, strict=True):
        if not any(m.role == "assistant" and m.weight > 0 for m in answer):
            raise RowProblem("no-answer", f"{what} has no turn that counts", "Give one of its turns a weight above 0.")
        if (last := answer[-1].role) != "assistant":
            message = f"{what} ends with a turn by the {last}, expected the assistant's"
            raise RowProblem("bad-answer", message, "Leave out what comes after the answer.")
        for turn in answer:
            _check_weight(turn, what)
    prompt = completed(question, attr, default_system, placeholders)
    chosen, rejected = (with_placeholders(answer, placeholders) for answer in (better, worse))
    margin = 0.0
    if attr.margin_column is not None:
        margin = number(column(row, attr.margin_column, "the margin", source), attr.margin_column)
    return PreferencePair(prompt, chosen, rejected, source, tools_of(row, attr), margin)


def _check_weight(message: Message, what: str) -> None:
    """Raise RowProblem for a turn that would count in part: answers are compared by all that they say."""
    if message.role == "assistant" and message.weight not in (0, 1):
        found = f"a turn of {what} has the weight {message.weight:g}, expected 1 (it counts) or 0 (it does not)"
        raise RowProblem("weight", found, "Write true, false, 1 or 0; only stage sft learns turns by their weight.")


def _answers(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> list[list[Message]]:
    keys = OPENAI_KEYS if attr.formatting == "alpaca" else keys_of(attr)
    names = (attr.chosen_column, attr.rejected_column)
    if names != (None, None) or attr.formatting != "alpaca":
        known = [required(n, key, attr, source) for n, key in zip(names, ("chosen", "rejected"), strict=True)]
        return [read_answer(column(row, n, what, source), keys, n, what) for n, what in zip(known, _SIDES, strict=True)]
    name = required(attr.response_column, "chosen and rejected, or response", attr, source)
    value = column(row, name, "the two answers", source)
    if not isinstance(value, list) or len(value) != 2:
        found = f"a list of {len(value)}" if isinstance(value, list) else type_name(value)
        message = f"column {name!r} is {found}, expected a list of two answers, the better one first"
        raise RowProblem("not-a-pair", message, "Write [better, worse], or name the columns chosen and rejected.")
    return [read_answer(answer, keys, name, what) for answer, what in zip(value, _SIDES, strict=True)]


def _parted(row: Mapping[str, Any], attr: DatasetAttr, source: Source) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and answers of two whole conversations."""
    keys = keys_of(attr)
    both = []
    for declared, key, what in zip((attr.chosen_column, attr.rejected_column), ("chosen", "rejected"), _SIDES, strict=True):
        name = required(declared, key, attr, source)
        both.append(read_turns(column(row, name, what, source), keys, name, f"turn of {what},"))
    better, worse = both
    shared = next((i for i, (a, b) in enumerate(zip(better, worse, strict=False)) if a != b), min(len(better), len(worse)))
    while shared and not (_answer_from(better, shared) and _answer_from(worse, shared)):
        shared -= 1
    if not shared:
        message = "the two conversations do not begin with the same turns and go on with one by the assistant"
        raise RowProblem("no-common-prompt", message, "Give both the same prompt, or name a column of its own for it.")
    return better[:shared], better[shared:], worse[shared:]


def _answer_from(messages: list[Message], start: int) -> bool:
    return start < len(messages) and messages[start].role == "assistant"


def convert_feedback(
    row: Mapping[str, Any],
    attr: DatasetAttr,
    source: Source,
    default_system: str | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> Feedback:
    """Turn one row into a dialogue whose last answer was found good or bad.

    Args, raises: as ``convert_row``.
    """
    name = required(attr.kto_tag_column, "kto_tag", attr, source)
    value = column(row, name, "the verdict", source)
    good = verdict(value)
    if good is None:
        found = repr(value) if isinstance(value, (int, float)) else type_name(value)
        fix = "Write true (good) or false (bad)."
        raise RowProblem("bad-label", f"column {name!r} is {found}, expected true or false", fix)
    dialogue = convert_row(row, attr, source, default_system, placeholders)
    last = dialogue.messages[-1]
    if last.role != "assistant" or last.weight == 0:
        found = f"by the {last.role}" if last.role != "assistant" else "of weight 0"
        message = f"the last turn is {found}; the verdict is on an answer by the assistant"
        raise RowProblem("no-answer", message, "End the row with the answer that was judged.")
    _check_weight(last, "the answer that was judged")
    return Feedback(dialogue.messages, good, source, dialogue.tools)


def convert_prompt(
    row: Mapping[str, Any],
    attr: DatasetAttr,
    source: Source,
    default_system: str | None = None,
    placeholders: Mapping[str, str] | None = None,
) -> Prompt:
    """Turn one row into a prompt: its turns up to the last one that is not the assistant's.

    What the assistant says after it is kept as the reference, to compare with; of a pair, the better answer. A row
    needs no answer.

    Args, raises: as ``convert_row``.
    """
    if attr.ranking:
        pair = convert_pair(row, attr, source, default_system, placeholders)
        return Prompt(pair.prompt, pair.chosen[0].content, source, pair.tools)
    messages = completed(read_question(row, attr, source), attr, default_system, placeholders)
    end = max((i + 1 for i, m in enumerate(messages) if m.role in ("user", "tool")), default=0)
    if not end:
        raise RowProblem("no-prompt", "no turn by the user to answer", "Add one, or leave the row out.")
    reference = "\n".join(m.content for m in messages[end:] if m.role == "assistant")
    if attr.formatting == "alpaca" and attr.response_column is not None and end == len(messages):
        reference = _reference(row.get(attr.response_column), attr.response_column, placeholders)
    return Prompt(messages[:end], reference, source, tools_of(row, attr))


def _reference(value: Any, name: str, placeholders: Mapping[str, str] | None) -> str:
    if holds_turns(value):
        answer = read_answer(value, OPENAI_KEYS, name)
    else:
        answer = [Message("assistant", text(value, "column", name))]
    return "\n".join(m.content for m in with_placeholders(answer, placeholders) if m.role == "assistant")
