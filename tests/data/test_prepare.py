from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import SHARED, make_rows, write_dataset
from tunesmith.config.arguments import DataArguments
from tunesmith.data.collator import collate
from tunesmith.data.prepare import DataReport, fingerprint, prepare_data, preprocess_data, split_rows
from tunesmith.errors import DataError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Message, Source


def prepare(model: Path, folder: Path, name: str = "rows", **values: Any) -> tuple[list[Example], DataReport]:
    report = DataReport()
    args = DataArguments(dataset=name, dataset_dir=str(folder), **values)
    conversations = prepare_data(args, args.dataset, report)
    return preprocess_data(conversations, AutoTokenizer.from_pretrained(model), args.cutoff_len, report), report


def test_every_row_is_accounted_for(tiny_model: Path, tmp_path: Path) -> None:
    rows: list[Any] = make_rows(10)
    rows[2]["output"] = ""
    rows[5]["instruction"] = 3
    rows[7]["output"] = "the " * 400
    rows[8]["instruction"] = "the " * 400
    examples, report = prepare(tiny_model, write_dataset(tmp_path, rows), cutoff_len=200)
    assert report.read == 10
    assert report.kept == len(examples) == 7
    assert {r: [s.row for s in v] for r, v in report.dropped.items()} == {
        "the answer, column 'output', is empty": [3],
        "column 'instruction' is a number, expected text": [6],
        "no answer token within cutoff_len 200": [9],
    }
    assert [s.row for s in report.cut] == [8]
    assert report.read == report.kept + sum(map(len, report.dropped.values()))
    text = "\n".join(report.lines())
    assert "7 of 10 rows kept" in text
    assert "rows.jsonl:9 (row 9)" in text
    assert "1 longer than cutoff_len" in text
    assert report.tokens == sum(map(len, examples))
    assert report.supervised == sum(int((e.labels != IGNORE_INDEX).sum()) for e in examples)


def test_d3_nothing_left_to_learn_is_an_error_with_reasons(tiny_model: Path, dataset: Path) -> None:
    with pytest.raises(DataError, match=r"no trainable tokens.*\n.*0 of 22(.*\n)*.*cutoff_len 4"):
        prepare(tiny_model, dataset, cutoff_len=4)


def test_placeholders_left_open_are_reported(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [{"instruction": "who", "output": "{{name}}"}])
    assert len(prepare(tiny_model, folder)[1].unfilled) == 1
    assert not prepare(tiny_model, folder, identity_name="M", identity_author="A")[1].unfilled


def test_sets_are_joined_in_order_and_limited_each(tiny_model: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, make_rows(5, 1), "a")
    write_dataset(tmp_path, make_rows(5, 2), "b")
    examples, _ = prepare(tiny_model, tmp_path, "b,a", max_samples=2)
    assert [(e.source.dataset, e.source.row) for e in examples] == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]


def test_split_is_seeded_disjoint_and_whole(tiny_model: Path, dataset: Path) -> None:
    examples, _ = prepare(tiny_model, dataset)
    train, held_out = split_rows(examples, 0.25, seed=1)
    assert (len(train), len(held_out)) == (16, 6)
    rows = [e.source.row for e in train] + [e.source.row for e in held_out]
    assert sorted(rows) == list(range(1, 23))
    assert [e.source.row for e in split_rows(examples, 0.25, seed=1)[1]] == [e.source.row for e in held_out]
    assert [e.source.row for e in split_rows(examples, 0.25, seed=2)[1]] != [e.source.row for e in held_out]
    assert len(split_rows(examples, 5, seed=1)[1]) == 5
    for share in (22, 0.01, 100):
        with pytest.raises(DataError, match="to evaluate"):
            split_rows(examples, share, seed=1)


def test_fingerprint_sees_every_change(tiny_model: Path, dataset: Path) -> None:
    examples, _ = prepare(tiny_model, dataset)
    base = fingerprint(examples)
    assert base == fingerprint(list(examples))
    assert base != fingerprint(examples[:-1])
    examples[3].labels[-2] = IGNORE_INDEX
    assert base != fingerprint(examples)


@pytest.mark.parametrize("name", ["identity", "alpaca_en_demo", "alpaca_zh_demo"])
def test_real_sets_convert_without_loss(tiny_model: Path, shared: Path, name: str) -> None:
    examples, report = prepare(tiny_model, shared / "data" / "demo", name, cutoff_len=8192)
    dropped = sum(map(len, report.dropped.values()))
    assert report.read == report.kept + dropped
    assert report.kept > 0.99 * report.read
    assert len(examples) == report.kept


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
def test_real_ids_are_those_of_apply_chat_template(tiny_model: Path) -> None:
    folder = SHARED / "data" / "demo"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    report = DataReport()
    args = DataArguments(dataset="alpaca_zh_demo", dataset_dir=str(folder), max_samples=50, cutoff_len=8192)
    conversations = prepare_data(args, args.dataset, report)
    examples = preprocess_data(conversations, tokenizer, args.cutoff_len, report)
    for conversation, example in zip(conversations, examples, strict=True):
        plain = [{"role": m.role, "content": m.content} for m in conversation.messages]
        assert example.input_ids.tolist() == tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False)


THINKING = """{%- set last = messages | length - 1 -%}
{%- for m in messages -%}
<|im_start|>{{ m.role }}
{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}{{ m.content.split('</think>')[1].lstrip() }}\
{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""


def dialogue(*weights: float) -> Conversation:
    turns = []
    for number, weight in enumerate(weights):
        turns += [
            Message("user", f"the cat {number}"),
            Message("assistant", f"<think>mat {number}</think>sat {number}", weight=weight),
        ]
    return Conversation(tuple(turns), Source("d", "d.jsonl", 1, 1))


def test_a_turn_that_is_rewritten_later_is_learned_as_it_was_said(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = THINKING.replace("\\\n", "")
    report = DataReport()
    examples = preprocess_data([dialogue(1, 1)], tokenizer, 512, report)
    learned = [tokenizer.decode(e.input_ids[e.labels != IGNORE_INDEX]) for e in examples]
    assert learned == ["<think>mat 0</think>sat 0<|im_end|>", "<think>mat 1</think>sat 1<|im_end|>"]
    assert (report.kept, len(report.noted)) == (1, 1)
    assert any("own rendering" in note for note in report.noted)
    prompt = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in dialogue(1, 1).messages[:3]],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer.decode(examples[1].input_ids).startswith(prompt)


def test_weights_of_turns_reach_their_tokens(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (example,) = preprocess_data([dialogue(0.5, 0, 1)], tokenizer, 512, DataReport())
    assert example.weights is not None
    learned = example.labels != IGNORE_INDEX
    pieces = {w: tokenizer.decode(example.input_ids[learned & (example.weights == w)]) for w in (0.5, 1.0)}
    assert pieces == {0.5: "<think>mat 0</think>sat 0<|im_end|>", 1.0: "<think>mat 2</think>sat 2<|im_end|>"}
    batch = collate([example])
    assert batch.weights_S is not None
    assert batch.total_weight == pytest.approx(
        0.5 * (batch.weights_S == 0.5).sum().item() + (batch.weights_S == 1).sum().item()
    )
