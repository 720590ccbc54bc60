"""Pairs, feedback and prompts: tokenised, stored, read again; against transformers' own rendering."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import SHARED, make_rows, tunesmith, write_dataset
from tunesmith.config.arguments import DataArguments, RunConfig
from tunesmith.config.load import load_config
from tunesmith.data.kinds import FEEDBACK, KINDS, PAIR, PROMPT, Rows
from tunesmith.data.prepare import load_rows, make_recipe, prepare_data
from tunesmith.data.preprocess import preprocess_data
from tunesmith.data.report import DataReport
from tunesmith.errors import DataError
from tunesmith.types import IGNORE_INDEX, Example, FeedbackExample, PairExample, Prompt

PAIR_ENTRY = {"ranking": True, "columns": {"prompt": "instruction", "query": "input", "chosen": "output", "rejected": "worse"}}


def make_pairs(count: int) -> list[dict[str, Any]]:
    return [{**a, "worse": b["output"] + "!"} for a, b in zip(make_rows(count), make_rows(count, 1), strict=True)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def configured(model: Path, folder: Path, tmp_path: Path, **values: Any) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({"model_name_or_path": str(model), "dataset": "rows", "dataset_dir": str(folder),
                                "output_dir": "x", **values}))  # fmt: skip
    return load_config(path)[0]


def ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], **options: Any) -> list[int]:
    made: list[int] = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **options)
    return made


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def learned(example: Example) -> list[int]:
    found: list[int] = example.input_ids[example.labels != IGNORE_INDEX].tolist()
    return found


def check_side(tokenizer: PreTrainedTokenizerBase, example: Example, question: str, answer: str) -> None:
    assert example.input_ids.tolist() == ids(tokenizer, turns(question, answer))[: len(example)]
    prompt = ids(tokenizer, turns(question), add_generation_prompt=True)
    assert example.input_ids[: len(prompt)].tolist() == prompt
    assert learned(example) == [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]


def test_pairs(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = make_pairs(20)
    folder = write_dataset(tmp_path / "data", rows, **PAIR_ENTRY)
    report = DataReport()
    train, held_out = load_rows(configured(tiny_model, folder, tmp_path, val_size=5, eval_steps=1), tokenizer, report, PAIR)
    assert held_out is not None
    assert (len(train), len(held_out)) == (15, 5)
    assert report.read == report.kept == 20
    seen = set()
    for pair in (*train, *held_out):
        row = rows[pair.source.row - 1]
        check_side(tokenizer, pair.chosen, row["instruction"], row["output"])
        check_side(tokenizer, pair.rejected, row["instruction"], row["worse"])
        seen.add(pair.source.row)
    assert len(seen) == 20
    assert train.lengths.tolist() == [len(pair) for pair in train]
    assert train.supervised == sum(len(learned(p.chosen)) + len(learned(p.rejected)) for p in train)
    assert train[-1].source == train[14].source
    with pytest.raises(IndexError):
        train[15]


@pytest.mark.parametrize("values", [{"mix_strategy": "interleave_over"}, {}])
def test_pairs_stay_together_when_sets_are_mixed_and_drawn(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = write_dataset(tmp_path / "data", make_pairs(5), "a", **PAIR_ENTRY, num_samples=12)
    write_dataset(folder, make_pairs(3), "b", **PAIR_ENTRY)
    config = configured(tiny_model, folder, tmp_path, dataset="a,b", **values)
    train, _ = load_rows(config, tokenizer, DataReport(), PAIR)
    assert len(train) == (23 if values else 15)
    assert all(isinstance(pair, PairExample) for pair in train)  # made only of two sides of one row


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start", "drop"])
def test_pairs_that_are_too_long(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, truncation: str) -> None:
    rows = [
        {"instruction": "the " * 60, "input": "", "output": "cat", "worse": "mat " * 8},
        {"instruction": "cat", "input": "", "output": "the " * 60, "worse": "mat"},
        {"instruction": "cat", "input": "", "output": "sat", "worse": "mat"},
    ]
    folder = write_dataset(tmp_path / "data", rows, **PAIR_ENTRY)
    report = DataReport()
    config = configured(tiny_model, folder, tmp_path, cutoff_len=40, truncation=truncation)
    train, _ = load_rows(config, tokenizer, report, PAIR)
    kept = {pair.source.row: pair for pair in train}
    assert report.read == report.kept + report.left_out() == 3
    assert set(kept) == {"keep_end": {1, 3}, "keep_start": {2, 3}, "drop": {3}}[truncation]
    assert all(max(len(pair.chosen), len(pair.rejected)) <= 40 for pair in train)
    if truncation == "keep_end":  # both sides keep the same prompt, and their whole answers
        lengths = [int(np.argmax(side.labels != IGNORE_INDEX)) for side in (kept[1].chosen, kept[1].rejected)]
        assert lengths[0] == lengths[1]
        assert np.array_equal(kept[1].chosen.input_ids[: lengths[0]], kept[1].rejected.input_ids[: lengths[0]])
        assert all(learned(side)[-1] == tokenizer.eos_token_id for side in (kept[1].chosen, kept[1].rejected))


def test_feedback_learns_the_judged_turn_alone(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"messages": turns("the", "cat", "sat", f"mat {i}"), "label": i % 2 == 0} for i in range(4)]
    folder = write_dataset(tmp_path / "data", rows, formatting="openai", columns={"messages": "messages", "kto_tag": "label"})
    train, _ = load_rows(configured(tiny_model, folder, tmp_path), tokenizer, DataReport(), FEEDBACK)
    for i, one in enumerate(train):
        assert isinstance(one, FeedbackExample)
        assert one.desirable == (i % 2 == 0)
        assert one.example.input_ids.tolist() == ids(tokenizer, rows[i]["messages"])[: len(one)]
        assert tokenizer.decode(learned(one.example)) == f"mat {i}<|im_end|>"


def test_prompts_are_what_chat_would_ask(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"instruction": "who", "output": "猫 \n <|im_end|>"}, {"instruction": "what"}, {"instruction": "the " * 90}]
    folder = write_dataset(tmp_path / "data", rows)
    report = DataReport()
    train, _ = load_rows(configured(tiny_model, folder, tmp_path, cutoff_len=64), tokenizer, report, PROMPT)
    assert [one.reference for one in train] == ["猫 \n <|im_end|>", "", ""]
    for one, question in zip(train, ("who", "what"), strict=False):
        assert one.input_ids.tolist() == ids(tokenizer, turns(question), add_generation_prompt=True)
    assert len(train[2]) <= 64
    ending = ids(tokenizer, turns("x"), add_generation_prompt=True)[-4:]
    assert train[2].input_ids[-4:].tolist() == ending
    assert [f.code for f in report.of("cut")] == ["truncated"]
    for one in train:  # the turns are those of the tokens, shortened with them
        said = [{"role": m.role, "content": m.content} for m in one.messages]
        assert one.input_ids.tolist() == ids(tokenizer, said, add_generation_prompt=True)
    assert 0 < len(train[2].messages[0].content) < len("the " * 90)


def test_prompts_keep_turns_and_tools(tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": ["猫", 1.5, None]}}}
    said = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "who"},
        {"role": "assistant", "content": "", "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "look"},
    ]  # fmt: skip
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    folder = write_dataset(tmp_path / "data", [{"messages": said, "tools": [tool]}], formatting="openai")
    config = configured(tiny_model, folder, tmp_path)
    (given,) = prepare_data(config.data, config.data.dataset, DataReport(), "prompt")
    (one,), _ = load_rows(config, tokenizer, DataReport(), PROMPT)
    assert isinstance(given, Prompt)
    assert (one.messages, one.tools) == (given.messages, given.tools)
    assert one.messages[2].tool_calls[0].arguments == {"at": ["猫", 1.5, None]}
    assert one.messages[2].reasoning == "hm"


@pytest.mark.parametrize(
    ("kind", "truncation"), [(PAIR, "split"), (FEEDBACK, "split"), (PROMPT, "split"), (PROMPT, "keep_start")]
)
def test_truncation_without_a_meaning_is_refused(kind: Any, truncation: Any) -> None:
    with pytest.raises(DataError, match=f"truncation: {truncation}"):
        make_recipe(DataArguments(truncation=truncation), kind.name)


@pytest.mark.parametrize(("stage", "kind"), [("dpo", PAIR), ("kto", FEEDBACK), ("ppo", PROMPT)])
def test_in_memory_as_on_disk(
    tiny_model: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, stage: str, kind: Any
) -> None:
    rows = [{**row, "label": i % 3 == 0} for i, row in enumerate(make_pairs(9))]
    entry = PAIR_ENTRY if kind is PAIR else {"columns": {"prompt": "instruction", "response": "output", "kto_tag": "label"}}
    folder = write_dataset(tmp_path / "data", rows, **entry)
    stored: Rows[Any]
    stored, _ = load_rows(configured(tiny_model, folder, tmp_path), tokenizer, DataReport(), kind)
    args = DataArguments(dataset="rows", dataset_dir=str(folder))
    report = DataReport()
    made = preprocess_data(prepare_data(args, ("rows",), report, kind.name), tokenizer, args, report, stage)
    assert [str(one) for one in made] == [str(one) for one in stored]
    assert report.read == report.kept == 9


def test_pretraining_in_memory_as_on_disk(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(row["output"] for row in make_rows(40)))
    args = DataArguments(dataset=str(tmp_path / "text.txt"), cutoff_len=32)
    report = DataReport()
    blocks = preprocess_data(prepare_data(args, args.dataset, report, "document"), tokenizer, args, report, "pt")
    stream = [i for row in make_rows(40) for i in (*tokenizer.encode(row["output"]), tokenizer.eos_token_id)]
    assert [i for block in blocks for i in block.input_ids.tolist()] == stream[: 32 * len(blocks)]
    assert report.remainder == len(stream) - 32 * len(blocks)


def test_preview_of_rows_by_number(settings: dict[str, Any], write_config: Any) -> None:
    rows = [*make_pairs(3), {"instruction": "the", "output": "", "worse": "b"}]
    write_dataset(Path(settings["dataset_dir"]), rows, "pairs", **PAIR_ENTRY)
    config = write_config({**settings, "dataset": "pairs"})
    shown = tunesmith("preview", config, "--as", "pair", "--row", 2, "--row", "pairs:4").stdout
    assert "chosen" in shown
    assert "rejected" in shown
    assert "certificate: the text is what apply_chat_template renders; learned: message 2" in shown
    assert "left out: the better answer, column 'output', is empty" in shown
    value = json.loads(tunesmith("preview", config, "--as", "pair", "--row", 2, "--json").stdout)
    (row,) = value["rows"]
    (pair,) = row["examples"]
    assert pair["rejected"]["learned_text"] == [rows[1]["worse"] + "<|im_end|>"]
    assert len(row["certificates"]) == 2
    assert "row 9" in tunesmith("preview", config, "--as", "pair", "--row", 9, check=False).stderr
    assert "expected the number of a row" in tunesmith("preview", config, "--row", "x", check=False).stderr
    assert "preference pairs" in tunesmith("preview", config, check=False).stderr
    first = json.loads(tunesmith("preview", config, "--as", "prompt", "--rows", 1, "--json").stdout)
    assert first["examples"][0]["reference"] == rows[0]["output"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize(("name", "kind"), [("dpo_en_demo", "pair"), ("dpo_zh_demo", "pair"), ("kto_en_demo", "feedback")])
def test_every_row_of_the_demonstration_sets(name: str, kind: Any, tmp_path: Path) -> None:
    """Ids equal transformers', row by row; learned is the answer with its end; rows in are rows kept."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers/minimind")
    folder = SHARED / "data/demo"
    report = DataReport()
    config = configured(SHARED / "tokenizers/minimind", folder, tmp_path, dataset=name, cutoff_len=100_000)
    made, _ = load_rows(config, tokenizer, report, KINDS[kind])
    rows = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert report.read == len(rows) == report.kept + report.left_out()
    assert len(made) == report.kept > 0.9 * len(rows)
    role = {"human": "user", "gpt": "assistant", "system": "system"}
    for one in made:
        row = rows[one.source.row - 1]
        if kind == "pair":
            prompt = [{"role": role[t["from"]], "content": t["value"]} for t in row["conversations"]]
            sides = [(one.chosen, row["chosen"]["value"]), (one.rejected, row["rejected"]["value"])]
        else:
            prompt, sides = row["messages"][:-1], [(one.example, row["messages"][-1]["content"])]
            assert one.desirable == row["label"]
        asked = ids(tokenizer, prompt, add_generation_prompt=True)
        for example, answer in sides:
            assert example.input_ids.tolist() == ids(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
            assert example.input_ids[: len(asked)].tolist() == asked
            assert (example.labels[: len(asked)] == IGNORE_INDEX).all()
            assert tokenizer.decode(learned(example)).rstrip("\n") == f"{answer}<|im_end|>"
