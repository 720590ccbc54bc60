"""Every demonstration set of the shared folder that stage sft takes: each row has the ids that transformers gives it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tunesmith.config.load import load_config
from tunesmith.data.prepare import load_set
from tunesmith.data.report import DataReport
from tunesmith.types import IGNORE_INDEX

ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def by_hand(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Messages and tools of a raw row, made without the code under test."""
    if "conversations" not in row:
        question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}], None
    messages: list[dict[str, Any]] = []
    for turn in row["conversations"]:
        if turn["from"] == "function_call":
            call = {"type": "function", "function": json.loads(turn["value"])}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    return messages, [{"type": "function", "function": tool} for tool in json.loads(row["tools"])] or None


def answers(messages: list[dict[str, Any]]) -> list[str]:
    return [m["content"] for m in messages if m["role"] == "assistant" and m["content"]]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("identity", ""),
        ("alpaca_zh_demo", ""),
        ("glaive_toolcall_en_demo", ""),
        pytest.param("alpaca_en_demo", "", marks=pytest.mark.slow),
        pytest.param("glaive_toolcall_zh_demo", "", marks=pytest.mark.slow),
        pytest.param("glaive_toolcall_en_demo", "Qwen-Qwen3-0.6B", marks=pytest.mark.slow),
        pytest.param("glaive_toolcall_zh_demo", "Qwen-Qwen3-0.6B", marks=pytest.mark.slow),
    ],
)
def test_ids_are_those_of_apply_chat_template(shared: Path, tmp_path: Path, name: str, template: str) -> None:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(shared / "tokenizers/minimind")
    if template:
        tokenizer.chat_template = (shared / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    folder = shared / "data/demo"
    settings = [f"dataset={name}", f"dataset_dir={folder}", f"tokenized_path={tmp_path}", "cutoff_len=32768"]
    config, _ = load_config(None, [*settings, "model_name_or_path=any", "output_dir=any"])
    report = DataReport()
    rows = load_set(config, name, 0, tokenizer, report, "conversation")
    raw = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert report.read == len(raw) == report.kept + report.left_out()
    assert report.kept > 0.99 * len(raw)
    views: dict[int, list[Any]] = {}
    for example in rows:
        views.setdefault(example.source.row, []).append(example)
    assert len(views) == report.kept
    for number, examples in views.items():
        messages, tools = by_hand(raw[number - 1])
        expected = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
        assert examples[-1].input_ids.tolist() == expected, f"row {number}"
        learned = "\0".join(tokenizer.decode(e.input_ids[e.labels != IGNORE_INDEX]) for e in examples)
        assert all(answer.strip() in learned for answer in answers(messages)), f"row {number}"
