from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import SHARED, tunesmith, write_dataset
from tunesmith.config.arguments import DataArguments, DatasetAttr
from tunesmith.data.convert import convert_row
from tunesmith.data.prepare import prepare_data
from tunesmith.data.preprocess import preprocess_data
from tunesmith.data.report import DataReport
from tunesmith.data.sniff import settle
from tunesmith.errors import DataError
from tunesmith.types import Source

AUTO = DatasetAttr(dataset_name="my.jsonl", file_name="my.jsonl", inline=True, formatting="auto")
OPENAI = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
MIXED = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"messages": OPENAI},
        {"conversations": SHAREGPT},
        {"conversations": MIXED},
        {"conversations": OPENAI, "tools": []},
    ],
)
def test_layouts_are_found(row: dict[str, Any]) -> None:
    attr, sentence = settle(AUTO, [row], "conversation")
    assert [(m.role, m.content) for m in convert_row(row, attr, Source("d", "f", 1, 1)).messages] == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    assert sentence.startswith("my.jsonl: ")


def test_unused_columns_are_named() -> None:
    assert settle(AUTO, [{"question": "q", "answer": "a", "id": 3}], "conversation")[1].endswith("ignored columns: id")


@pytest.mark.parametrize("row", [{"a": "b"}, {"messages": "text"}, {"messages": [[1]]}])
def test_unknown_layouts_name_the_columns(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be told"):
        settle(AUTO, [row], "conversation")


def test_plain_text_in_sft_names_the_stage() -> None:
    with pytest.raises(DataError, match="plain text, which stage pt takes"):
        settle(AUTO, [{"text": "long"}], "conversation")
    declared = DatasetAttr(dataset_name="d", prompt_column="text", response_column=None)
    with pytest.raises(DataError, match="'d' declares formatting alpaca, but the rows are plain text, which stage pt takes"):
        settle(declared, [{"text": "long"}], "conversation")
    attr, _ = settle(AUTO, [{"text": "long"}], "document")
    assert attr.prompt_column == "text"


def test_a_wrong_declaration_names_the_entry_that_fits(settings: dict[str, Any], write_config: Any) -> None:
    folder = write_dataset(Path(settings["dataset_dir"]), [{"conversations": SHAREGPT}, {"conversations": SHAREGPT}], "chats")
    done = tunesmith("preview", write_config({**settings, "dataset": "chats"}), check=False)
    assert done.returncode == 2
    assert "declares formatting alpaca" in done.stderr
    entry = json.loads(done.stderr[done.stderr.index("{") :])
    registry = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**registry, "chats": entry}))
    assert "2 of 2 rows kept" in tunesmith("preview", write_config({**settings, "dataset": "chats"})).stdout


def test_a_file_trains_without_a_registry(settings: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "my chats.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps({"messages": OPENAI}) + "\n" for _ in range(8)))
    done = tunesmith("train", write_config({**settings, "dataset": [str(file)], "max_steps": 1}))
    assert "turns in column 'messages' (openai), speakers user/assistant" in done.stdout
    assert "8 of 8 rows kept" in done.stdout


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize("name", ["glaive_toolcall_en_demo", "glaive_toolcall_zh_demo"])
def test_real_tool_calls_are_rendered_as_the_library_does(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/minimind")
    report = DataReport()
    args = DataArguments(dataset=name, dataset_dir=str(SHARED / "data/demo"), cutoff_len=100_000)
    conversations = list(prepare_data(args, args.dataset, report))
    assert report.read == len(conversations) == 300
    assert sum(bool(m.tool_calls) for c in conversations for m in c.messages) > 200
    conversations = conversations[:60]
    examples = preprocess_data(conversations, tokenizer, args, report)
    by_row = {example.source.row: example for example in examples}
    for conversation in conversations:
        plain = [
            {"role": m.role, "content": m.content}
            | (
                {
                    "tool_calls": [
                        {"type": "function", "function": {"name": c.name, "arguments": c.arguments}} for c in m.tool_calls
                    ]
                }
                if m.tool_calls
                else {}
            )
            for m in conversation.messages
        ]
        ids = tokenizer.apply_chat_template(plain, tools=list(conversation.tools) or None, tokenize=True, return_dict=False)
        assert by_row[conversation.source.row].input_ids.tolist() == ids
