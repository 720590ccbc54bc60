"""``streaming: true`` through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import make_rows, tunesmith, write_dataset
from tunesmith.data import mixture
from tunesmith.train.runlog import read_log

TIMES = ("elapsed_time", "remaining_time", "step_seconds", "tokens_per_second")
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"val_size": 3, "eval_steps": 6},
    "packed": {"packing": True, "cutoff_len": 128, "gradient_accumulation_steps": 2},
    "interleaved": {"dataset": "rows,more", "mix_strategy": "interleave_under", "interleave_probs": [0.4, 0.6]},
    "pretraining": {"dataset": "corpus", "stage": "pt", "cutoff_len": 32},
}


@pytest.fixture
def streaming(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two sets and a corpus, read in chunks of 5 rows and shuffled in buffers of 8."""
    monkeypatch.setattr(mixture, "CHUNK", 5)
    folder = Path(settings["dataset_dir"])
    write_dataset(folder, make_rows(17, 5), "more")
    write_dataset(folder, [{"text": row["output"]} for row in make_rows(40, 7)], "corpus", columns={"prompt": "text"})
    return {**settings, "streaming": True, "buffer_size": 8, "max_steps": 20, "per_device_train_batch_size": 2}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(run)]


def forget(run: Path, step: int) -> None:
    """Leave the folder as a run does that is killed between this step and the next checkpoint."""
    for name in ("train_results.json", "adapter_model.safetensors"):
        (run / name).unlink(missing_ok=True)
    for folder in run.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_was_stopped_goes_on_bit_equal(streaming: dict[str, Any], write_config: Any, kind: str) -> None:
    config = write_config({**streaming, **KINDS[kind], "save_steps": 1})
    unbroken, broken = Path(streaming["output_dir"]), Path(streaming["output_dir"]).parent / "broken"
    whole = tunesmith("train", config)
    assert "end of the stream after update" in whole.stdout
    shutil.copytree(unbroken, broken)
    for step in (13, 5):
        forget(broken, step)
        done = tunesmith("train", config, f"output_dir={broken}", "resume_from_checkpoint=auto")
        assert f"resuming from {broken}/checkpoint-{step}" in done.stdout
        assert log_of(broken) == log_of(unbroken)
        one, two = (load_file(run / "adapter_model.safetensors") for run in (unbroken, broken))
        assert all((one[key] == two[key]).all() for key in one)
        assert (broken / "data_report.json").read_text() == (unbroken / "data_report.json").read_text()


def test_nothing_is_stored(
    streaming: dict[str, Any], write_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_DATA_CACHE", str(tmp_path / "cache"))
    config = write_config({**streaming, "max_steps": 2})
    tunesmith("train", config)
    tunesmith("check", config)
    tunesmith("preview", config)
    assert not (tmp_path / "cache").exists()


def test_a_bad_row_ends_the_run_when_it_is_reached(streaming: dict[str, Any], write_config: Any) -> None:
    rows: list[Any] = make_rows(40)
    del rows[30]["output"]
    rows[12]["output"] = ""
    write_dataset(Path(streaming["dataset_dir"]), rows)
    config = write_config(streaming)
    run = Path(streaming["output_dir"])
    done = tunesmith("train", config, check=False)
    assert done.returncode == 2
    assert "rows.jsonl:31 (row 31): no column 'output'" in done.stderr
    (saved,) = run.glob("checkpoint-*")
    assert f"{saved} was written" in done.stdout
    assert json.loads((run / "data_report.json").read_text())["findings"][0]["rows"][0].endswith("rows.jsonl:13 (row 13)")
    done = tunesmith("train", config, "on_bad_row=drop", "resume_from_checkpoint=auto")
    assert f"resuming from {saved}" in done.stdout
    assert "38 of 40 rows kept" in done.stdout
    done = tunesmith("train", config, "on_bad_row=error", f"output_dir={run}-strict", check=False)
    assert "rows.jsonl:13 (row 13): " in done.stderr


def test_a_changed_file_is_noticed_when_going_on(streaming: dict[str, Any], write_config: Any) -> None:
    config = write_config(streaming)
    tunesmith("train", config, "max_steps=2")
    write_dataset(Path(streaming["dataset_dir"]), make_rows(22, seed=9))
    done = tunesmith("train", config, "resume_from_checkpoint=auto", check=False)
    assert done.returncode == 2
    assert "training data: " in done.stderr


def test_check_reads_all_of_it_and_preview_the_first_rows(streaming: dict[str, Any], write_config: Any) -> None:
    rows: list[Any] = make_rows(40)
    rows[38]["output"] = ""
    write_dataset(Path(streaming["dataset_dir"]), rows)
    config = write_config(streaming)
    done = tunesmith("check", config, "--json", check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [(entry["code"], entry["line"]) for entry in found["errors"]] == [("empty-answer", 39)]
    assert found["counts"] == {"rows": {"read": 40, "kept": 39, "dropped": 1, "truncated": 0}}
    assert found["plan"]["updates"] == 20
    stored = json.loads(tunesmith("check", config, "--json", "streaming=false", "buffer_size=16384", check=False).stdout)
    assert found["lengths"] == stored["lengths"]
    columns = {"prompt": "instruction", "query": "inputt", "response": "output"}
    write_dataset(Path(streaming["dataset_dir"]), rows, columns=columns)
    errors = json.loads(tunesmith("check", config, "--json", check=False).stdout)["errors"]
    assert any("no row has the column 'inputt'" in entry["message"] for entry in errors)
    write_dataset(Path(streaming["dataset_dir"]), rows)
    assert "plan: 20 updates; once through the sets are 39 examples" in tunesmith("check", config, check=False).stdout
    examples = json.loads(tunesmith("preview", config, "--json", "--rows", "3").stdout)["examples"]
    assert [example["source"].rpartition(":")[2] for example in examples] == ["1 (row 1)", "2 (row 2)", "3 (row 3)"]
