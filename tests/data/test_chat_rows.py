"""Sharegpt and OpenAI turns: tool calls, reasoning, weights, and what cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.chat import keys_of, unread_keys
from tunesmith.data.convert import alternates, convert_row
from tunesmith.data.problem import RowProblem
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Message, Source, ToolCall

SOURCE = Source("d", "d.jsonl", 7, 7)
OPENAI = DatasetAttr(
    dataset_name="d", file_name="d.jsonl", formatting="openai", messages_column="messages", role_tag="role",
    content_tag="content", user_tag="user", assistant_tag="assistant", observation_tag="tool", tools_column="tools",
)  # fmt: skip
SHAREGPT = DatasetAttr(dataset_name="d", file_name="d.jsonl", formatting="sharegpt", tools_column="tools")
WEATHER = {"name": "weather", "parameters": {"type": "object"}}


def openai(*turns: dict[str, Any], **columns: Any) -> Conversation:
    return convert_row({"messages": list(turns), **columns}, OPENAI, SOURCE)


def test_parallel_tool_calls_keep_the_text_beside_them() -> None:
    calls = [
        {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "巴黎"}'}},
        {"id": "2", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}},
    ]
    row = openai(
        {"role": "user", "content": "both?"},
        {"role": "assistant", "content": "Looking.", "tool_calls": calls},
        {"role": "tool", "content": "20", "tool_call_id": "1"},
        {"role": "tool", "content": "30", "tool_call_id": "2", "name": "weather"},
        {"role": "assistant", "content": "Rome."},
        tools=[{"type": "function", "function": WEATHER}],
    )
    assert row.messages[1:4] == (
        Message(
            "assistant",
            "Looking.",
            tool_calls=(ToolCall("weather", {"city": "巴黎"}, "1"), ToolCall("weather", {"city": "Rome"}, "2")),
        ),
        Message("tool", "20", tool_call_id="1"),
        Message("tool", "30", name="weather", tool_call_id="2"),
    )
    assert row.tools == ({"type": "function", "function": WEATHER},)
    assert alternates(row.messages)


def test_null_content_parts_reasoning_and_weights() -> None:
    row = openai(
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": ""}}], "loss": False},
        {"role": "function", "content": "r", "name": "f"},
        {"role": "assistant", "content": "c", "reasoning_content": "why", "weight": 0.5},
    )
    assert row.messages == (
        Message("developer", "brief"),
        Message("user", "ab"),
        Message("assistant", "", tool_calls=(ToolCall("f", {}),), weight=0.0),
        Message("tool", "r", name="f"),
        Message("assistant", "c", reasoning="why", weight=0.5),
    )


def test_sharegpt_calls_and_observations() -> None:
    turns = [
        {"from": "human", "value": "q"},
        {
            "from": "function_call",
            "value": json.dumps([{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": "{}"}]),
        },
        {"from": "observation", "value": "[1]"},
        {"from": "gpt", "value": "a"},
    ]
    row = convert_row({"conversations": turns, "tools": json.dumps([WEATHER])}, SHAREGPT, SOURCE)
    assert row.messages == (
        Message("user", "q"),
        Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}), ToolCall("g", {}))),
        Message("tool", "[1]"),
        Message("assistant", "a"),
    )
    assert row.tools == ({"type": "function", "function": WEATHER},)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("turn", "code", "reason"),
    [
        ({"role": "narrator", "content": "x"}, "unknown-speaker", "turn 2 is by 'narrator'"),
        ({"role": "assistant"}, "bad-turn", "has no 'content'"),
        ({"content": "x"}, "bad-turn", "has no 'role'"),
        ("text", "bad-turn", "expected an object"),
        ({"role": "assistant", "content": None}, "empty-answer", "is empty"),
        ({"role": "assistant", "content": 3}, "not-text", "a number"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "not-text", "image_url"),
        ({"role": "assistant", "tool_calls": "{"}, "bad-tool-call", "no JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "bad-tool-call", "no name"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "bad-tool-call", "a list"),
        ({"role": "assistant", "content": "x", "loss": -1}, "bad-weight", "negative"),
        ({"role": "assistant", "content": "x", "loss": 1, "weight": 0}, "conflicting-keys", "differ"),
        ({"role": "user", "content": "x", "loss": True}, "misplaced-key", "only the assistant learns"),
        ({"role": "user", "content": "x"}, "no-answer", "no assistant turn"),
        ({"role": "assistant", "content": "x", "weight": 0}, "no-answer", "no assistant turn"),
    ],
)
def test_turns_that_cannot_be_used(turn: Any, code: str, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason) as caught:
        openai(USER, turn)
    assert caught.value.code == code


def test_system_column_and_system_turn() -> None:
    attr = SHAREGPT.model_copy(update={"system_column": "s"})
    turns = [{"from": "system", "value": "be"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert len(convert_row({"conversations": turns, "s": "be"}, attr, SOURCE).messages) == 3
    with pytest.raises(RowProblem, match="different system messages"):
        convert_row({"conversations": turns, "s": "other"}, attr, SOURCE)


@pytest.mark.parametrize(
    ("roles", "by_turns"),
    [("system user assistant", True), ("user assistant tool assistant user assistant", True), ("assistant user", False),
     ("user user assistant", False), ("user assistant assistant", False)],
)  # fmt: skip
def test_alternation_is_told_not_demanded(roles: str, by_turns: bool) -> None:
    assert alternates([Message(role, "x") for role in roles.split()]) == by_turns  # type: ignore[arg-type]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "tool_calls", "function", "name", "arguments", "loss", "from"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSON, JSON, st.sampled_from(["user", "assistant", "tool"]))
def test_no_row_raises_anything_else(content: Any, calls: Any, role: str) -> None:
    for messages in (content, [{"role": role, "content": content, "tool_calls": calls}, {"role": "assistant", "content": "x"}]):
        for attr in (OPENAI, SHAREGPT.model_copy(update={"messages_column": "messages"})):
            try:
                row = convert_row({"messages": messages, "tools": calls}, attr, SOURCE)
            except (RowProblem, DataError):
                continue
            assert row.messages


def test_keys_that_nobody_reads_are_told() -> None:
    turns = [{"role": "user", "content": "q", "audio": None}, {"role": "assistant", "content": "a", "wieght": 2, "loss": 1}]
    assert unread_keys(turns, keys_of(OPENAI)) == ["wieght"]
    assert unread_keys("text", keys_of(OPENAI)) == []
