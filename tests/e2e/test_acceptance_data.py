"""The acceptance cases on data, through the command line: sets that lead elsewhere, bad rows, long prompts, pads."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_rows, make_tokenizer, tunesmith, write_dataset
from tunesmith.config.load import load_config
from tunesmith.data.padding import DynamicDataCollatorWithPadding
from tunesmith.data.prepare import load_examples
from tunesmith.data.report import DataReport
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.serve.chat import load_chat
from tunesmith.train.runlog import read_log
from tunesmith.types import IGNORE_INDEX, Message

# ---- D1


@pytest.fixture
def sink() -> Iterator[tuple[str, list[str]]]:
    """A local address, and the paths that were asked for there."""
    hits: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", hits
    server.shutdown()
    thread.join()
    server.server_close()


def test_d1_sets_that_lead_elsewhere_are_refused(
    settings: dict[str, Any], write_config: Any, tmp_path: Path, sink: tuple[str, list[str]]
) -> None:
    address, hits = sink
    folder = Path(settings["dataset_dir"])
    outside = write_dataset(tmp_path / "outside", make_rows(4)) / "rows.jsonl"
    (folder / "link.jsonl").symlink_to(outside)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'CANARY')!r}, 'w')")
    names = ["../../../etc/passwd", str(outside), "link.jsonl", f"file://{outside}", f"{address}/x.json"]
    entries: dict[str, Any] = {f"set{number}": {"file_name": name} for number, name in enumerate(names)}
    entries["script"] = {"script_url": "evil.py"}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    for entry in entries:
        began = time.monotonic()
        done = tunesmith("train", write_config({**settings, "dataset": entry}), check=False)
        assert done.returncode == 2, entry
        assert f"'{entry}'" in done.stderr
        assert "leaves dataset_dir" in done.stderr or "never run" in done.stderr
        assert time.monotonic() - began < 10
    assert hits == []
    assert not (tmp_path / "CANARY").exists()
    assert not Path(settings["output_dir"]).exists()


# ---- D2

PLACE = 32
"""Line of the bad row among 64."""


def dialogue_line(question: str, answer: str | None) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns}, ensure_ascii=False)


def dialogue_lines() -> list[bytes]:
    return [dialogue_line(row["instruction"], row["output"]).encode() for row in make_rows(64)]


TURNED = json.dumps({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}).encode()
BAD = {
    "truncated JSON": (dialogue_lines()[3][:-9], "refused"),
    "NUL byte": (dialogue_line("the \0 cat", "sat").encode(), "dropped"),
    "raw NUL byte": (dialogue_lines()[3].replace(b"}", b"\0}", 1), "refused"),
    "lone surrogate": (dialogue_line("the cat", "SURROGATE").encode().replace(b"SURROGATE", b"\\ud800"), "dropped"),
    "raw surrogate": (dialogue_line("the cat", "SURROGATE").encode().replace(b"SURROGATE", b"\xed\xa0\x80"), "refused"),
    "wrong role order": (TURNED, "note"),
    "empty assistant": (dialogue_line("the cat", "").encode(), "dropped"),
    "content null": (dialogue_line("the cat", None).encode(), "dropped"),
    "5 MB answer": (dialogue_line("the cat", "the " * 1_250_000).encode(), "dropped"),
    "5 MB question": (dialogue_line("the " * 1_250_000, "sat").encode(), "cut"),
}


def write_lines(settings: dict[str, Any], content: bytes) -> dict[str, Any]:
    folder = Path(settings["dataset_dir"])
    (folder / "bad.jsonl").write_bytes(content)
    entry = {"bad": {"file_name": "bad.jsonl", "formatting": "openai", "columns": {"messages": "messages"}}}
    (folder / "dataset_info.json").write_text(json.dumps(entry))
    return {**settings, "dataset": "bad", "max_steps": 1}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "5 MB answer" else n for n in BAD])
def test_d2_a_bad_row_is_refused_or_counted_with_its_line(settings: dict[str, Any], write_config: Any, name: str) -> None:
    line, outcome = BAD[name]
    lines = dialogue_lines()
    lines[PLACE - 1] = line
    config = write_config(write_lines(settings, b"\n".join(lines) + b"\n"))
    done = tunesmith("train", config, check=False)
    report_file = Path(settings["output_dir"]) / "data_report.json"
    if outcome == "refused":
        assert done.returncode == 2
        assert f"bad.jsonl:{PLACE}:" in done.stderr
        assert not report_file.parent.exists()
        return
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text(encoding="utf-8"))
    assert (report["read"], report["kept"]) == (64, 63 if outcome == "dropped" else 64)
    (finding,) = report["findings"]
    assert (finding["kind"], finding["count"]) == (outcome, 1)
    assert f"bad.jsonl:{PLACE}" in finding["rows"][0]
    assert f"bad.jsonl:{PLACE} (row {PLACE})" in done.stdout


@pytest.mark.parametrize("form", ["byte-order mark", "CRLF"])
def test_d2_marks_and_line_ends_give_the_same_ids(settings: dict[str, Any], write_config: Any, form: str) -> None:
    def ids(content: bytes) -> list[list[int]]:
        done = tunesmith("preview", write_config(write_lines(settings, content)), "--rows", 64, "--json")
        return [example["input_ids"] for example in json.loads(done.stdout)["examples"]]

    clean = b"\n".join(dialogue_lines()) + b"\n"
    changed = b"\xef\xbb\xbf" + clean if form == "byte-order mark" else clean.replace(b"\n", b"\r\n")
    expected = ids(clean)
    assert len(expected) == 64
    assert ids(changed) == expected


# ---- D3


def test_d3_prompts_that_leave_no_answer_token(settings: dict[str, Any], write_config: Any) -> None:
    folder, long = Path(settings["dataset_dir"]), {"instruction": "the cat " * 200, "output": "sat"}
    write_dataset(folder, [long] * 64, "all")
    write_dataset(folder, [*make_rows(39), long, *make_rows(24, 1)], "one")
    shortened = {**settings, "cutoff_len": 200, "truncation": "keep_start"}
    done = tunesmith("train", write_config({**shortened, "dataset": "all"}), check=False)
    assert done.returncode == 2
    assert "no trainable tokens in any row" in done.stderr
    assert "64 rows: longer than cutoff_len 200, and no answer token is left" in done.stderr
    assert not Path(settings["output_dir"]).exists()
    done = tunesmith("train", write_config({**shortened, "dataset": "one"}))
    assert "1 dropped: longer than cutoff_len 200, and no answer token is left" in done.stdout
    assert "one.jsonl:40 (row 40)" in done.stdout
    assert "63 of 64 rows kept" in done.stdout
    losses = [e["loss"] for e in read_log(Path(settings["output_dir"]))]
    assert len(losses) == 16
    assert torch.tensor(losses).isfinite().all()


# ---- D5


def test_d5_pad_equal_to_end_keeps_the_end_learned(
    tmp_path: Path, tiny_model: Path, settings: dict[str, Any], write_config: Any
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    make_tokenizer(model, pad_is_eos=True)
    described = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] != "<|endoftext|>"]
    (model / "tokenizer.json").write_text(json.dumps(described), encoding="utf-8")
    rows = make_rows(8, seed=3)
    write_dataset(Path(settings["dataset_dir"]), rows, "eight")
    settings.update(model_name_or_path=str(model), dataset="eight", finetuning_type="full", learning_rate=3e-3, max_steps=200)
    settings["attn_implementation"] = "sdpa"  # rows of a batch are padded
    config, _ = load_config(write_config(settings))
    tokenizer = load_tokenizer(config.model)
    end = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == end

    examples = list(load_examples(config, tokenizer, DataReport())[0])
    for side in ("left", "right"):
        for batch in (examples[:4], examples[4:]):
            padded = DynamicDataCollatorWithPadding(tokenizer, side)(batch)
            assert len(set(map(len, batch))) > 1
            pads = padded["attention_mask"] == 0
            assert (padded["input_ids"][pads] == end).all()
            assert (padded["labels"][pads] == IGNORE_INDEX).all()
            for ids, labels, is_pad in zip(padded["input_ids"], padded["labels"], pads, strict=True):
                last = int(((ids == end) & ~is_pad).nonzero()[-1])
                assert labels[last] == end

    tunesmith("train", write_config(settings))
    chat = load_chat(settings["output_dir"])
    ended = 0
    for row in rows:
        prompt = torch.tensor([chat.engine.template.encode_prompt([Message("user", row["instruction"])])])
        output = chat.engine.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                            max_new_tokens=120, eos_token_id=end, pad_token_id=end)[0, prompt.shape[1] :]  # fmt: skip
        ended += output[-1] == end and tokenizer.decode(output[:-1]) == row["output"]
    assert ended == 8
