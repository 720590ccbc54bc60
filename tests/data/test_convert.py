from __future__ import annotations

from typing import Any

import pytest

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.convert import convert_row
from tunesmith.data.problem import RowProblem
from tunesmith.types import Source

SOURCE = Source("d", "d.jsonl", 7, 7)


def turns(row: dict[str, Any], values: dict[str, Any] | None = None, **options: Any) -> list[tuple[str, str]]:
    attr = DatasetAttr(dataset_name="d", file_name="d.jsonl", **(values or {}))
    return [(m.role, m.content) for m in convert_row(row, attr, SOURCE, **options).messages]


def test_alpaca() -> None:
    assert turns({"instruction": "Add", "input": "1+1", "output": "2"}) == [("user", "Add\n1+1"), ("assistant", "2")]
    assert turns({"instruction": "Hi", "output": "Hello"}) == [("user", "Hi"), ("assistant", "Hello")]


def test_alpaca_with_history_and_system() -> None:
    row = {"instruction": "c", "output": "d", "past": [["a", "b"]], "sys": "s"}
    columns = {"history_column": "past", "system_column": "sys"}
    expected = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert turns(row, columns) == expected


def test_sharegpt_with_tags() -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tags = {"formatting": "sharegpt", "messages_column": "messages", "role_tag": "role", "content_tag": "content",
            "user_tag": "user", "assistant_tag": "assistant"}  # fmt: skip
    assert turns(row, tags) == [("user", "a"), ("assistant", "b")]
    plain = {
        "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    }
    assert turns(plain, {"formatting": "sharegpt"}) == [("system", "s"), ("user", "a"), ("assistant", "b")]


def test_prefix_placeholders_and_default_system() -> None:
    row = {"instruction": "Who?", "output": "{{name}} by {{author}}, {{other}}"}
    options = {"default_system": "s", "placeholders": {"name": "M", "author": "A"}}
    expected = [("system", "s"), ("user", "> Who?"), ("assistant", "M by A, {{other}}")]
    assert turns(row, {"source_prefix": "> "}, **options) == expected


@pytest.mark.parametrize("column", ["instruction", "output"])
def test_missing_column_names_row_and_columns(column: str) -> None:
    row = {"instruction": "a", "output": "b", "extra": 1}
    del row[column]
    with pytest.raises(RowProblem, match=rf"no column '{column}'.*'extra'") as caught:
        turns(row)
    assert caught.value.unreadable
    with pytest.raises(RowProblem, match="no column 'conversations'"):
        turns(row, {"formatting": "sharegpt"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "", "output": "b"}, "the prompt is empty"),
        ({"instruction": None, "output": "b"}, "the prompt is empty"),
        ({"instruction": "a", "output": " "}, "the answer, column 'output', is empty"),
        ({"instruction": "a", "output": None}, "the answer, column 'output', is empty"),
        ({"instruction": 3, "output": "b"}, "column 'instruction' is a number"),
        ({"instruction": "a", "output": ["b"]}, "column 'output' is a list"),
    ],
)
def test_alpaca_rows_that_cannot_be_used(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        turns(row)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "an empty list"),
        ("text", "expected a list"),
        ([{"from": "human", "value": "a"}], "no assistant turn"),
        ([{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}], "turn 2 is by 'bot'"),
        ([{"from": ["gpt"], "value": "a"}], "turn 1 is by"),
        ([{"from": "human"}], "turn 1 has no 'value'"),
        (["x"], "turn 1 is text, expected an object"),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": None}], "turn 2, by the assistant, is empty"),
    ],
)
def test_sharegpt_rows_that_cannot_be_used(value: Any, reason: str) -> None:
    with pytest.raises(RowProblem, match=reason):
        turns({"conversations": value}, {"formatting": "sharegpt"})


@pytest.mark.parametrize("history", ["text", [["a"]], [["a", 1]], ["ab"]])
def test_history_that_cannot_be_used(history: Any) -> None:
    with pytest.raises(RowProblem, match=r"pairs|earlier turn 1 is a number"):
        turns({"instruction": "a", "output": "b", "h": history}, {"history_column": "h"})


@pytest.mark.parametrize("text", ["a\0b", "\ud800"])
def test_characters_that_no_tokenizer_takes(text: str) -> None:
    with pytest.raises(RowProblem, match=r"NUL character|half of a surrogate pair"):
        turns({"instruction": text, "output": "b"})
