"""The command line, as a person uses it, in fresh processes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import make_rows, tunesmith, tunesmith_process, write_dataset
from tunesmith.train.runlog import read_log

TIMES = ("elapsed_time", "remaining_time", "step_seconds", "tokens_per_second")


def log_of(run: Path) -> list[dict[str, Any]]:
    """The log without what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in read_log(run)]


def test_a_run_leaves_what_it_promises(settings: dict[str, Any], write_config: Any) -> None:
    settings.update(
        val_size=4, eval_steps=2, save_steps=2, plot_loss=True, sample_prompts=["the cat", "你好"], sample_max_new_tokens=4
    )
    settings.update(eval_on_start=True, num_train_epochs=4)
    done = tunesmith_process("train", write_config(settings))
    run = Path(settings["output_dir"])
    for name in (
        "config.yaml", "manifest.json", "trainer_log.jsonl", "training_loss.png", "adapter_model.safetensors",
        "adapter_config.json", "tokenizer.json", "chat_template.jinja", "train_results.json", "samples.jsonl",
        "finetuning_args.json", "data_report.json",
    ):  # fmt: skip
        assert (run / name).is_file(), name
    assert (run / "training_loss.png").read_bytes()[:4] == b"\x89PNG"
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(s["when"], s["prompt"]) for s in samples] == [(w, p) for w in ("before", "after") for p in ("the cat", "你好")]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("before: ") for line in lines) == sum(line.startswith("after: ") for line in lines) == 2
    assert f"tunesmith chat {run}" in done.stdout
    assert "22 of 22 rows kept" in done.stdout

    entries = read_log(run)
    steps = [e for e in entries if "loss" in e]
    assert [e["current_steps"] for e in steps] == list(range(1, 21))
    keys = {"current_steps", "total_steps", "loss", "learning_rate", "grad_norm", "epoch", "percentage", "elapsed_time",
            "remaining_time", "num_tokens", "step_seconds", "tokens_per_second"}  # fmt: skip
    assert keys <= steps[0].keys()
    evaluations = [e for e in entries if "eval_loss" in e]
    assert [e["current_steps"] for e in evaluations] == [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert 0 <= evaluations[-1]["eval_accuracy"] <= 1
    report = json.loads((run / "data_report.json").read_text(encoding="utf-8"))
    per_epoch = [e["num_tokens"] for e in steps[:5]]
    assert sum(per_epoch) < report["tokens"]


@pytest.mark.parametrize(
    "changes", [{}, {"finetuning_type": "full", "learning_rate": 1e-3}, {"compute_dtype": "bf16"}], ids=["lora", "full", "bf16"]
)
@pytest.mark.parametrize("stop", [3, 5, 6])
def test_k3_a_resumed_run_ends_bit_equal(
    settings: dict[str, Any], write_config: Any, changes: dict[str, Any], stop: int
) -> None:
    """20 rows, windows of 4: five an epoch. Stops in the middle, at the end of an epoch, after the first of the next."""
    settings.update(num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, lora_dropout=0.1, val_size=2,
                    eval_steps=5, save_steps=1, logging_steps=2, lr_scheduler_type="cosine", load_best_model_at_end=True, **changes)  # fmt: skip
    settings.update(lora_dropout=0.0) if "finetuning_type" in changes else None
    config = write_config(settings)
    unbroken, broken = Path(settings["output_dir"]), Path(settings["output_dir"]).parent / "broken"
    tunesmith("train", config)
    tunesmith("train", config, f"output_dir={broken}")
    for folder in broken.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > stop:
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
    for path in broken.glob("*.safetensors"):
        path.unlink()
    done = tunesmith("train", config, f"output_dir={broken}", "resume_from_checkpoint=auto")
    assert f"resuming from {broken}/checkpoint-{stop}" in done.stdout
    assert log_of(broken) == log_of(unbroken)
    for name in [p.name for p in unbroken.glob("*.safetensors")]:
        one, two = load_file(unbroken / name), load_file(broken / name)
        assert one.keys() == two.keys()
        assert all((one[key] == two[key]).all() for key in one)
    last = "checkpoint-10"
    assert (unbroken / last / "optimizer.safetensors").read_bytes() == (broken / last / "optimizer.safetensors").read_bytes()


def test_the_longest_rows_come_first_where_rows_are_grouped_by_length(settings: dict[str, Any], write_config: Any) -> None:
    settings.update(group_by_length=True, per_device_train_batch_size=2, num_train_epochs=2)
    config, run = write_config(settings), Path(settings["output_dir"])
    tunesmith("train", config)
    tokens = [entry["num_tokens"] for entry in read_log(run)]
    assert tokens[0] == max(tokens)
    tunesmith("train", config, f"output_dir={run}-2", "num_train_epochs=1", "lr_scheduler_type=constant")
    plain = [entry["num_tokens"] for entry in read_log(Path(f"{run}-2"))]
    assert plain == tokens[:11]
    assert tokens[11:] != plain


def test_auto_with_nothing_to_resume_says_so(settings: dict[str, Any], write_config: Any) -> None:
    done = tunesmith("train", write_config(settings), "resume_from_checkpoint=auto", "max_steps=1")
    assert "nothing to resume" in done.stdout


def test_a_finished_run_says_so_and_can_go_on(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    tunesmith("train", config, "max_steps=2")
    done = tunesmith_process("train", config, "max_steps=2", "resume_from_checkpoint=auto")
    assert "already complete (2/2 updates)" in done.stdout
    tunesmith("train", config, "max_steps=4", "resume_from_checkpoint=auto")
    assert read_log(Path(settings["output_dir"]))[-1]["current_steps"] == 4


def test_c3_a_used_folder_is_refused_with_three_ways_out(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    run = Path(settings["output_dir"])
    tunesmith("train", config, "max_steps=2", "save_steps=1")
    (run / "notes.txt").write_text("mine")
    (run / "checkpoint-mine").mkdir()
    before = sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*"))
    began = time.monotonic()
    done = tunesmith("train", config, check=False)
    assert done.returncode == 2
    assert time.monotonic() - began < 30
    for way in ("another output_dir", "resume_from_checkpoint=auto", "overwrite_output_dir=true"):
        assert way in done.stderr
    assert sorted((p.name, p.stat().st_mtime_ns) for p in run.rglob("*")) == before
    tunesmith("train", config, "max_steps=1", "overwrite_output_dir=true")
    assert (run / "notes.txt").read_text() == "mine"
    assert (run / "checkpoint-mine").is_dir()
    assert not (run / "checkpoint-2").exists()
    assert read_log(run)[-1]["current_steps"] == 1


def test_a_damaged_checkpoint_is_skipped_or_refused(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    run = Path(settings["output_dir"])
    tunesmith("train", config, "max_steps=3", "save_steps=1")
    path = run / "checkpoint-3" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = tunesmith("train", config, "max_steps=4", f"resume_from_checkpoint={run}/checkpoint-3", check=False)
    assert done.returncode == 2
    assert "checkpoint-3/adapter_model.safetensors: damaged" in done.stderr
    done = tunesmith("train", config, "max_steps=4", "resume_from_checkpoint=auto")
    assert "checkpoint-3/adapter_model.safetensors: damaged" in done.stdout
    assert f"resuming from {run}/checkpoint-2" in done.stdout


def test_other_inputs_are_refused_on_resume(settings: dict[str, Any], write_config: Any, dataset: Path) -> None:
    config = write_config(settings)
    tunesmith("train", config, "max_steps=2", "save_steps=1")
    write_dataset(dataset, make_rows(22, seed=9))
    arguments = ("max_steps=4", "resume_from_checkpoint=auto", "per_device_train_batch_size=2")
    done = tunesmith("train", config, *arguments, check=False)
    assert done.returncode == 2
    assert "per_device_train_batch_size: 4 then, 2 now" in done.stderr
    assert "training data: " in done.stderr


def test_k6_best_and_last_survive_the_limit(settings: dict[str, Any], write_config: Any) -> None:
    settings.update(val_size=4, eval_steps=1, save_steps=1, save_total_limit=1, load_best_model_at_end=True)
    settings.update(max_steps=6, learning_rate=0.5, max_grad_norm=0)
    tunesmith("train", write_config(settings))
    run = Path(settings["output_dir"])
    results = json.loads((run / "train_results.json").read_text())
    kept = sorted(int(p.name.partition("-")[2]) for p in run.glob("checkpoint-*"))
    assert kept == sorted({results["best_step"], 6})
    best = load_file(run / f"checkpoint-{results['best_step']}" / "adapter_model.safetensors")
    final = load_file(run / "adapter_model.safetensors")
    assert all((best[key] == final[key]).all() for key in best)
    losses = {e["current_steps"]: e["eval_loss"] for e in read_log(run) if "eval_loss" in e}
    assert results["best_eval_loss"] == min(losses.values()) == losses[results["best_step"]]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_k10_a_signal_stops_with_a_checkpoint(settings: dict[str, Any], write_config: Any, number: int, status: int) -> None:
    settings.update(max_steps=100_000, save_steps=100_000)
    run = Path(settings["output_dir"])
    command = [sys.executable, "-m", "tunesmith", "train", str(write_config(settings))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(read_log(run)) < 3:
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status, stderr
    assert "resume_from_checkpoint=auto" in stderr
    (checkpoint,) = run.glob("checkpoint-*")
    assert int(checkpoint.name.partition("-")[2]) == read_log(run)[-1]["current_steps"]


def test_n1_a_loss_that_is_no_number_stops_before_the_update(settings: dict[str, Any], write_config: Any) -> None:
    settings.update(learning_rate=1e20, max_grad_norm=0, max_steps=20, save_steps=1)
    done = tunesmith("train", write_config(settings), check=False)
    assert done.returncode == 1
    assert "nothing was updated" in done.stderr
    assert "rows.jsonl:" in done.stderr
    for folder in Path(settings["output_dir"]).glob("checkpoint-*"):
        assert all(t.isfinite().all() for t in load_file(folder / "adapter_model.safetensors").values())


def test_missing_file_and_column_name_themselves(settings: dict[str, Any], write_config: Any, dataset: Path) -> None:
    config = write_config(settings)
    rows: list[Any] = make_rows(3)
    del rows[1]["output"]
    write_dataset(dataset, rows)
    done = tunesmith("train", config, check=False)
    assert done.returncode == 2
    assert "rows.jsonl:2 (row 2): no column 'output'" in done.stderr
    (dataset / "rows.jsonl").unlink()
    assert "no such file" in tunesmith("train", config, check=False).stderr
    assert not Path(settings["output_dir"], "trainer_log.jsonl").exists()


def test_wrong_keys_are_answered_without_a_traceback(settings: dict[str, Any], write_config: Any) -> None:
    done = tunesmith("train", write_config({**settings, "learnng_rate": 1, "loraa_rank": 2, "sed": 3}), check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 3 problems")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("path", "said"),
    [("/nowhere/model", "no such folder"), ("builtin:gpt9", "no built-in model"), ("{dataset}", "no config.json")],
)
def test_models_that_are_none(settings: dict[str, Any], write_config: Any, dataset: Path, path: str, said: str) -> None:
    done = tunesmith("train", write_config({**settings, "model_name_or_path": path.format(dataset=dataset)}), check=False)
    assert done.returncode == 2
    assert said in done.stderr


def test_preview_shows_the_mask(settings: dict[str, Any], write_config: Any) -> None:
    config = write_config(settings)
    shown = tunesmith("preview", config, "--rows", 1).stdout
    assert "⟦" in shown
    assert "<|im_end|>⟧" in shown
    value = json.loads(tunesmith("preview", config, "--json", "--rows", 3).stdout)
    assert value["report"]["kept"] == 22
    row = value["examples"][2]
    answer = make_rows(22)[2]["output"] + "<|im_end|>"
    assert row["learned_text"] == [answer]
    assert [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100] == [
        x for x in row["labels"] if x != -100
    ]


def test_chat_answers_once_and_from_a_pipe(settings: dict[str, Any], write_config: Any, tiny_model: Path) -> None:
    tunesmith("train", write_config(settings), "max_steps=1")
    run = settings["output_dir"]
    once = tunesmith("chat", run, "--prompt", "the cat", "do_sample=false", "max_new_tokens=5").stdout
    piped = tunesmith("chat", run, "do_sample=false", "max_new_tokens=5", stdin="the cat\n/clear\nthe cat\n/exit\n").stdout
    assert piped == once * 2
    beams = tunesmith("chat", run, "--prompt", "the cat", "do_sample=false", "max_new_tokens=5", "num_beams=2").stdout
    assert beams.strip()
    assert tunesmith("chat", tiny_model, "--prompt", "the cat", "max_new_tokens=3").returncode == 0
    assert "Did you mean top_p" in tunesmith("chat", run, "--prompt", "x", "topp=0.5", check=False).stderr
    assert "lora_rank: settings of training" in tunesmith("chat", run, "--prompt", "x", "lora_rank=3", check=False).stderr
    assert "has not finished" in _unfinished_chat(Path(run))


def _unfinished_chat(run: Path) -> str:
    (run / "train_results.json").unlink()
    return tunesmith("chat", run, "--prompt", "x", check=False).stderr


def test_plot_draws_anew(settings: dict[str, Any], write_config: Any) -> None:
    tunesmith("train", write_config(settings), "max_steps=2")
    path = Path(tunesmith("plot", settings["output_dir"]).stdout.splitlines()[-1])
    assert path.read_bytes()[:4] == b"\x89PNG"
    done = tunesmith("plot", path.parent.parent, check=False)
    assert "holds no loss" in done.stderr


def test_help_is_quick_and_light() -> None:
    script = "import sys, time; t = time.perf_counter(); import tunesmith.cli; assert 'torch' not in sys.modules; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5
    assert "train" in tunesmith_process("--help").stdout
    assert tunesmith("--version").stdout.startswith("tunesmith ")
