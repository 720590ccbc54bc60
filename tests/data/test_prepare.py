from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.conftest import make_rows, tunesmith, write_dataset
from tunesmith.config.arguments import DataArguments
from tunesmith.data.collator import collate
from tunesmith.data.prepare import prepare_data
from tunesmith.data.preprocess import preprocess_data
from tunesmith.data.report import DataReport
from tunesmith.data.tokenize import TextEncoder
from tunesmith.errors import DataError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Message, Source


def prepare(model: Path, folder: Path, name: str = "rows", **values: Any) -> tuple[list[Example], DataReport]:
    report = DataReport()
    args = DataArguments(dataset=name, dataset_dir=str(folder), **values)
    conversations = list(prepare_data(args, args.dataset, report))
    return preprocess_data(conversations, AutoTokenizer.from_pretrained(model), args, report), report


def test_every_row_is_accounted_for(tiny_model: Path, tmp_path: Path) -> None:
    rows: list[Any] = make_rows(10)
    rows[2]["output"] = ""
    rows[5]["instruction"] = 3
    rows[7]["output"] = "the " * 400
    rows[8]["instruction"] = "the " * 400
    examples, report = prepare(tiny_model, write_dataset(tmp_path, rows), cutoff_len=200)
    assert report.read == 10
    assert report.kept == len(examples) == 7
    assert {f.message: [source.row for source, _ in f.rows] for f in report.of("dropped")} == {
        "the answer, column 'output', is empty": [3],
        "column 'instruction' is a number, expected text": [6],
        "longer than cutoff_len 200, and the answer alone is too long": [8],
    }
    (cut,) = report.of("cut")
    assert [source.row for source, _ in cut.rows] == [9]
    assert report.read == report.kept + report.left_out()
    text = "\n".join(report.lines())
    assert "7 of 10 rows kept" in text
    assert "rows.jsonl:9 (row 9)" in text
    assert "the head of the question, left out" in text
    assert report.tokens == sum(map(len, examples))
    assert report.supervised == sum(int((e.labels != IGNORE_INDEX).sum()) for e in examples)


def test_d3_nothing_left_to_learn_is_an_error_with_reasons(tiny_model: Path, dataset: Path) -> None:
    with pytest.raises(DataError, match=r"no trainable tokens.*\n +22 rows: longer than cutoff_len 4"):
        prepare(tiny_model, dataset, cutoff_len=4)


def test_placeholders_left_open_are_reported(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [{"instruction": "who", "output": "{{name}}"}])
    assert [f.code for f in prepare(tiny_model, folder)[1].of("note")] == ["unfilled"]
    assert not prepare(tiny_model, folder, identity_name="M", identity_author="A")[1].of("note")


def test_sets_are_joined_in_order_and_limited_each(tiny_model: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path, make_rows(5, 1), "a")
    write_dataset(tmp_path, make_rows(5, 2), "b")
    examples, _ = prepare(tiny_model, tmp_path, "b,a", max_samples=2)
    assert [(e.source.dataset, e.source.row) for e in examples] == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]


@pytest.mark.parametrize("name", ["identity", "alpaca_en_demo", "alpaca_zh_demo"])
def test_real_sets_convert_without_loss(tiny_model: Path, shared: Path, name: str) -> None:
    examples, report = prepare(tiny_model, shared / "data" / "demo", name, cutoff_len=8192)
    assert report.read == report.kept + report.left_out()
    assert report.kept > 0.99 * report.read
    assert len(examples) == report.kept


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
    examples = preprocess_data([dialogue(1, 1)], tokenizer, DataArguments(cutoff_len=512), report)
    learned = [tokenizer.decode(e.input_ids[e.labels != IGNORE_INDEX]) for e in examples]
    assert learned == ["<think>mat 0</think>sat 0<|im_end|>", "<think>mat 1</think>sat 1<|im_end|>"]
    assert report.kept == 1
    assert ["own rendering" in finding.message for finding in report.of("note")] == [True]
    prompt = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in dialogue(1, 1).messages[:3]],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert tokenizer.decode(examples[1].input_ids).startswith(prompt)


def test_weights_of_turns_reach_their_tokens(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (example,) = preprocess_data([dialogue(0.5, 0, 1)], tokenizer, DataArguments(cutoff_len=512), DataReport())
    assert example.weights is not None
    learned = example.labels != IGNORE_INDEX
    pieces = {w: tokenizer.decode(example.input_ids[learned & (example.weights == w)]) for w in (0.5, 1.0)}
    assert pieces == {0.5: "<think>mat 0</think>sat 0<|im_end|>", 1.0: "<think>mat 2</think>sat 2<|im_end|>"}
    batch = collate([example])
    assert batch.weights_S is not None
    assert batch.total_weight == pytest.approx(
        0.5 * (batch.weights_S == 0.5).sum().item() + (batch.weights_S == 1).sum().item()
    )


@pytest.mark.parametrize("policy", ["keep_end", "keep_start", "split", "drop", "error"])
def test_every_truncation_is_counted_and_within_the_cutoff(tiny_model: Path, tmp_path: Path, policy: str) -> None:
    turns = [Message("system", "rain")]
    for number in range(6):
        turns += [Message("user", f"the cat {number}"), Message("assistant", f"sat on {number}")]
    rows = [
        {"messages": [{"role": m.role, "content": m.content} for m in turns]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    folder = write_dataset(tmp_path, rows, formatting="openai")
    examples, report = prepare(tiny_model, folder, cutoff_len=60, truncation=policy)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert all(len(e) <= 60 for e in examples)
    assert report.read == report.kept + report.left_out() == 2
    learned = [tokenizer.decode(e.input_ids[e.labels != IGNORE_INDEX]) for e in examples]
    counted = {f.kind: [s.row for s, _ in f.rows] for f in report.of("cut", "dropped", "uncertified")}
    if policy == "keep_end":
        assert counted == {"cut": [1]}
        assert learned[0].endswith("sat on 5<|im_end|>")
        assert tokenizer.decode(examples[0].input_ids).startswith(
            "<|im_start|>system\nrain<|im_end|>\n<|im_start|>user\nthe cat "
        )
        assert not learned[0].startswith("sat on 0")
    elif policy == "keep_start":
        assert counted == {"cut": [1]}
        assert learned[0].startswith("sat on 0<|im_end|>")
    elif policy == "split":
        assert counted == {"cut": [1]}
        assert "".join(learned[:-1]) == "".join(f"sat on {n}<|im_end|>" for n in range(6))
    else:
        assert counted == {"dropped" if policy == "drop" else "uncertified": [1]}
        assert len(examples) == 1


def test_a_long_question_loses_as_little_as_will_do_from_its_head(tiny_model: Path, tmp_path: Path) -> None:
    question = " ".join(f"{n}" for n in range(200)) + " the end"
    examples, _ = prepare(tiny_model, write_dataset(tmp_path, [{"instruction": question, "output": "cat"}]), cutoff_len=80)
    text = AutoTokenizer.from_pretrained(tiny_model).decode(examples[0].input_ids)
    assert len(examples[0]) in (79, 80)
    assert text.endswith("the end<|im_end|>\n<|im_start|>assistant\ncat<|im_end|>\n")


def test_rows_that_cannot_be_certified_end_the_run_unless_told(settings: dict[str, Any], write_config: Any) -> None:
    folder = Path(settings["dataset_dir"])
    rows = [*make_rows(5), {"instruction": "a", "output": "b"}]
    write_dataset(folder, rows, "mixed")
    with (folder / "mixed.jsonl").open("a") as file:
        file.write('{"instruction": "a", \n')
        file.write('{"instruction": "", "output": "b"}\n')
    asked = {**settings, "dataset": "mixed"}
    done = tunesmith("preview", write_config(asked), check=False)
    assert done.returncode == 2
    assert "1 of 8 rows cannot be trained on" in done.stderr
    assert "mixed.jsonl:7:" in done.stderr
    assert "6 of 8 rows kept" in tunesmith("preview", write_config(asked), "on_bad_row=drop").stdout
    strict = tunesmith("preview", write_config(asked), "on_bad_row=error", check=False)
    assert "2 of 8 rows cannot be trained on" in strict.stderr
    assert "mixed.jsonl:8 (row 8): the prompt is empty" in strict.stderr


def test_a_huge_row_is_cut_without_tokenising_what_cannot_fit(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, longest = TextEncoder.encode, [0]

    def watched(self: TextEncoder, texts: Any) -> Any:
        longest[0] = max(longest[0], *(len(text.text) for text in texts))
        return encode(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    row = {"instruction": "the cat sat " * 100_000, "output": "mat"}
    (example,), report = prepare(tiny_model, write_dataset(tmp_path, [row]), cutoff_len=64)
    assert [finding.count for finding in report.of("cut")] == [1]
    assert 48 < len(example) <= 64
    encoder = TextEncoder(AutoTokenizer.from_pretrained(tiny_model))
    assert longest[0] <= 64 * encoder.longest_token
