"""Our runs against a loop of transformers and PEFT alone: same initialisation, same rows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.contenders.bare import BareLoop

from tests.conftest import SHARED, make_rows, tunesmith
from tunesmith.train.runlog import read_log


def bare_loop(folder: str, rows: list[dict[str, str]], batch: int, steps: int, rate: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of the bare loop in float32."""
    loop = BareLoop(folder, rows, batch, steps, rate)
    return [loop.step(index) for index in range(steps)]


def our_run(run: Path) -> list[tuple[float, float]]:
    return [(entry["loss"], entry["grad_norm"]) for entry in read_log(run) if "loss" in entry]


def assert_equal(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> None:
    assert len(ours) == len(theirs)
    for step, (mine, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for value, reference, name in zip(mine, other, ("loss", "gradient norm"), strict=True):
            assert math.isclose(value, reference, rel_tol=1e-5), f"step {step}: {name} {value} against {reference}"


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_twenty_steps_on_the_tiny_model(settings: dict[str, Any], write_config: Any, tiny_model: Path, attention: str) -> None:
    settings.update(disable_shuffling=True, max_steps=20, learning_rate=1e-3, attn_implementation=attention)
    tunesmith("train", write_config(settings))
    theirs = bare_loop(str(tiny_model), make_rows(22), batch=4, steps=20, rate=1e-3)
    ours = our_run(Path(settings["output_dir"]))
    assert ours[0][0] > ours[-1][0]
    assert_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
def test_twenty_steps_on_the_real_model_and_real_rows(tmp_path: Path) -> None:

    folder = tunesmith("fetch", "smollm2-135m").stdout.splitlines()[-1]
    rows = json.loads((SHARED / "data/demo/alpaca_en_demo.json").read_text(encoding="utf-8"))[:80]
    rows = [row for row in rows if len(row["output"]) < 900][:40]
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}', encoding="utf-8")
    run = tmp_path / "run"
    tunesmith(
        "train", "examples/sft_lora.yaml", f"dataset_dir={data}", "dataset=rows", f"output_dir={run}", "max_steps=20",
        "compute_dtype=fp32", "disable_shuffling=true", "per_device_train_batch_size=2", "gradient_accumulation_steps=1",
        "learning_rate=1e-4", "val_size=0", "eval_strategy=no", "eval_steps=null", "eval_on_start=false",
        "load_best_model_at_end=false", "lr_scheduler_type=linear", "warmup_ratio=0", "lora_rank=8", "weight_decay=0",
    )  # fmt: skip
    assert_equal(our_run(run), bare_loop(folder, rows, batch=2, steps=20, rate=1e-4))
