"""Seeded faults are found at their lines; clean sets give no alarm."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SHARED, make_rows, tunesmith, write_dataset

FAULTS = [
    '{"instruction": "the cat", "output": "sat"',
    '{"instruction": "the cat", "output": sat}',
    "not json at all",
    '{"instruction": "the cat", "output": ""}',
    '{"instruction": "", "output": "sat"}',
    '{"instruction": "the cat", "output": 3}',
    '{"instruction": ["the"], "output": "sat"}',
    '{"instruction": "the cat"}',
    '{"output": "sat"}',
    '["the cat", "sat"]',
    '{"instruction": "the \\u0000 cat", "output": "sat"}',
    '{"instruction": "the \\ud800 cat", "output": "sat"}',
    '{"instruction": "the cat", "output": null}',
]


def checked(config: Path, *overrides: str, status: int = 0) -> dict[str, Any]:
    done = tunesmith("check", config, "--json", *overrides, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def seed_faults(folder: Path, rows: int, count: int, seed: int = 0) -> set[int]:
    rng = random.Random(seed)
    file = folder / "rows.jsonl"
    clean = [
        json.dumps({"instruction": f"cat {n} {r['instruction']}", "output": r["output"]}) for n, r in enumerate(make_rows(rows))
    ]
    places = rng.sample(range(rows), count)
    for index, place in enumerate(places):
        clean[place] = FAULTS[index % len(FAULTS)]
    file.write_text("\n".join(clean) + "\n", encoding="utf-8")
    return {place + 1 for place in places}


def test_forty_faults_are_found_at_their_lines(settings: dict[str, Any], write_config: Any) -> None:
    lines = seed_faults(Path(settings["dataset_dir"]), 1500, 40)
    result = checked(write_config(settings), status=1)
    assert {entry["line"] for entry in result["errors"]} == lines
    assert len(result["errors"]) == 40
    assert all(entry["file"].endswith("rows.jsonl") and entry["code"] and entry["message"] for entry in result["errors"])
    assert not result["warnings"]
    counts = result["counts"]["rows"]
    assert counts == {"read": 1500, "kept": 1460, "dropped": 40, "truncated": 0, "duplicate": 0}


def test_a_clean_set_gives_no_alarm(settings: dict[str, Any], write_config: Any) -> None:
    result = checked(write_config(settings))
    assert result["errors"] == result["warnings"] == []
    assert result["plan"]["updates"] == result["plan"]["updates_per_epoch"] == 6
    assert sum(b["count"] for b in result["lengths"]["histogram"]) == 22
    assert not Path(settings["output_dir"]).exists()


def test_duplicates_and_leaks_are_named(settings: dict[str, Any], write_config: Any) -> None:
    folder = Path(settings["dataset_dir"])
    rows = make_rows(6, 3)
    write_dataset(folder, [*rows, rows[1]], "train")
    write_dataset(folder, [rows[4], *make_rows(2, 9)], "test")
    result = checked(write_config({**settings, "dataset": "train", "eval_dataset": "test", "eval_strategy": "epoch"}))
    assert [(w["code"], w["line"]) for w in result["warnings"]] == [("duplicate", 7), ("leak", 1)]
    assert result["counts"]["train"]["duplicate"] == 1
    result = checked(write_config({**settings, "dataset": "test", "eval_dataset": "test", "eval_strategy": "epoch"}))
    assert [(w["code"], w["line"]) for w in result["warnings"]] == [("leak", line) for line in (1, 2, 3)]
    assert {name: counts["duplicate"] for name, counts in result["counts"].items()} == {"test": 0, "test (evaluation)": 3}


def test_configuration_errors_have_their_lines(settings: dict[str, Any], tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: x\nlearnng_rate: 1e-4\noutput_dir: o\ndataset: a\nlora_rank: 0\n")
    result = checked(config, status=1)
    assert [(e["line"], e["message"].partition(":")[0]) for e in result["errors"]] == [(2, "learnng_rate"), (5, "lora_rank")]


def test_missing_files_and_models_are_errors_not_crashes(settings: dict[str, Any], write_config: Any) -> None:
    assert "data set 'nosuch': no path" in checked(write_config(settings), "dataset=nosuch", status=1)["errors"][0]["message"]
    assert checked(write_config(settings), "model_name_or_path=./nosuch", status=1)["errors"][0]["code"] == "ModelError"


def test_lengths_and_cuts_for_a_person(settings: dict[str, Any], write_config: Any, tmp_path: Path) -> None:
    png = tmp_path / "lengths.png"
    done = tunesmith("check", write_config(settings), "cutoff_len=40", "truncation=keep_start", "--png", png, check=False)
    assert "longer than cutoff_len 40" in done.stdout
    assert "tokens: " in done.stdout
    assert "plan: " in done.stdout
    assert png.read_bytes()[:4] == b"\x89PNG"
    done = tunesmith("check", write_config(settings), "--png", tmp_path / "none" / "lengths.png", check=False)
    assert done.returncode == 2
    assert "error: --png" in done.stderr


def test_text_is_checked_too(settings: dict[str, Any], write_config: Any) -> None:
    folder = Path(settings["dataset_dir"])
    (folder / "c.jsonl").write_text('{"text": "the cat sat on a mat"}\n{"text": ""}\n{"txt": "a"}\n' * 4)
    (folder / "dataset_info.json").write_text('{"c": {"file_name": "c.jsonl", "columns": {"prompt": "text"}}}')
    result = checked(write_config({**settings, "stage": "pt", "dataset": "c", "cutoff_len": 8}), status=1)
    assert len(result["errors"]) == 8
    assert result["counts"]["c"]["kept"] == 4
    assert result["counts"]["c"]["duplicate"] == 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize("name", ["identity", "alpaca_en_demo", "alpaca_zh_demo"])
def test_real_sets_add_up(settings: dict[str, Any], write_config: Any, name: str) -> None:
    config = {
        **settings,
        "dataset": name,
        "dataset_dir": str(SHARED / "data/demo"),
        "identity_name": "M",
        "identity_author": "A",
    }
    done = tunesmith("check", write_config({**config, "cutoff_len": 8192}), "--json", check=False)
    result = json.loads(done.stdout)
    counts = result["counts"][name]
    assert counts["read"] == counts["kept"] + counts["dropped"]
    assert counts["dropped"] == len(result["errors"])


def test_rows_can_be_read_as_what_other_stages_take(settings: dict[str, Any], write_config: Any) -> None:
    rows = [{"prompt": "the", "chosen": f"cat {i}", "rejected": "cat 5" if i == 5 else "mat"} for i in range(6)]
    entry = {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}
    write_dataset(Path(settings["dataset_dir"]), [*rows, rows[0], {**rows[1], "rejected": " "}], "pairs", **entry)
    config = write_config({**settings, "dataset": "pairs"})
    value = json.loads(tunesmith("check", config, "--as", "pair", "--json", check=False).stdout)
    assert value["counts"]["pairs"] == {"read": 8, "kept": 7, "dropped": 1, "truncated": 0, "duplicate": 1}
    assert [(e["code"], e["line"]) for e in value["errors"]] == [("empty-answer", 8)]
    assert ("equal-answers", 6) in [(e["code"], e["line"]) for e in value["warnings"]]
    assert value["plan"]["train_examples"] == 7
    assert "preference pairs" in tunesmith("check", config, check=False).stdout


def test_rows_that_may_be_left_out_are_no_errors(settings: dict[str, Any], write_config: Any) -> None:
    file = Path(settings["dataset_dir"]) / "rows.jsonl"
    file.write_text(file.read_text() + '{"instruction": "the", "output": ""}\n{"broken\n')
    value = checked(write_config({**settings, "on_bad_row": "drop"}))
    assert {w["line"] for w in value["warnings"] if w["code"] in ("empty-answer", "bad-json")} == {23, 24}
    assert len(checked(write_config(settings), status=1)["errors"]) == 2
