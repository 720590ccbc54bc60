"""``tunesmith pipeline`` from pretraining to a reward model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import make_rows, tunesmith, tunesmith_process, write_dataset
from tests.e2e.test_reward_model import COLUMNS, pairs
from tunesmith.config.pipeline import load_pipeline
from tunesmith.errors import CheckpointError
from tunesmith.pipeline import process
from tunesmith.pipeline.plan import plan
from tunesmith.pipeline.state import State
from tunesmith.train.runlog import read_log

BEGUN = ["pt", "sft", "rm"]


@pytest.fixture
def file(settings: dict[str, Any], tmp_path: Path) -> Path:
    """pt -> sft -> rm on the tiny model, a few updates each."""
    folder = Path(settings["dataset_dir"])
    write_dataset(folder, pairs(12), "pairs", ranking=True, columns=COLUMNS)
    write_dataset(folder, [{"text": row["output"]} for row in make_rows(40, 5)], "texts", columns={"prompt": "text"})
    common = {key: value for key, value in settings.items() if key != "dataset"}
    stages = [
        {"name": "pt", "stage": "pt", "dataset": "texts", "cutoff_len": 64},
        {"name": "sft", "dataset": "rows", "checkpoint_dir": "${pt}", "sample_prompts": ["<b>the</b> cat"]},
        {"config": "rm.yaml"},
    ]
    (tmp_path / "rm.yaml").write_text("stage: rm\ndataset: pairs\ncheckpoint_dir: ${sft}\n", encoding="utf-8")
    every = {**common, "output_dir": str(tmp_path / "all"), "max_steps": 3, "save_steps": 1, "sample_max_new_tokens": 4}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({**every, "stages": stages}), encoding="utf-8")
    return path


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stages run in this process, as the command line would, without the check before; returns what was started."""
    calls: list[list[str]] = []

    def start(arguments: Sequence[str], keep: Sequence[int] = ()) -> int:
        calls.append(list(arguments))
        if "--dry-run" in arguments:
            return 0
        done = tunesmith(*arguments, check=False)
        print(done.stdout, done.stderr)
        return done.returncode

    monkeypatch.setattr(process, "start", start)
    return calls


def trained(started: list[list[str]]) -> list[str]:
    """Names of the stages that were started since the last look."""
    names = [Path(call[1]).stem for call in started if call[0] == "train"]
    started.clear()
    return names


def test_each_stage_goes_on_from_the_last_and_is_kept(file: Path, started: list[list[str]], tmp_path: Path) -> None:
    folder = tmp_path / "all"
    shown = tunesmith("pipeline", file, "--dry-run").stdout
    assert "sft: rows: 22 rows read, 22 kept" in shown and shown.count("0 errors") == 3
    assert not folder.exists()

    done = tunesmith("pipeline", file)
    assert started[0] == ["pipeline", str(file), "--dry-run"]
    assert trained(started) == BEGUN
    for name in BEGUN:
        assert [entry["current_steps"] for entry in read_log(folder / name)] == [1, 2, 3]
    given = yaml.safe_load((folder / "rm.yaml").read_text())
    assert given["checkpoint_dir"] == str(folder / "sft") and "lora_rank" not in given
    assert f"talk to it:  tunesmith chat {folder / 'sft'}" in done.stdout
    page = (folder / "pipeline.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;the&lt;/b&gt; cat" in page and "<b>" not in page
    assert "http" not in page and page.count("<section>") == 3
    assert (folder / "pipeline.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((folder / "pipeline.json").read_text())["stages"]
    assert [record[name]["status"] for name in BEGUN] == ["finished"] * 3
    assert record["pt"]["settings"].keys() == {  # and no defaults, to which a later version may add some
        "model_name_or_path", "compute_dtype", "dataset", "dataset_dir", "cutoff_len", "stage", "output_dir", "learning_rate",
        "num_train_epochs", "max_steps", "save_steps", "sample_max_new_tokens",
    }  # fmt: skip
    assert record["rm"]["made_from"] == {"sft": record["sft"]["began"]}

    again = tunesmith("pipeline", file)
    assert started == []
    assert again.stdout.count("finished with the same settings") == 3


def test_a_stopped_stage_is_gone_on_with(
    file: Path, started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, whole = tmp_path / "all", process.start

    def failing(arguments: Sequence[str], keep: Sequence[int] = ()) -> int:
        status = whole(arguments, keep)
        if "sft.yaml" not in arguments[1]:
            return status
        run = folder / "sft"
        for path in (*run.glob("*.safetensors"), run / "train_results.json"):
            path.unlink()
        shutil.rmtree(run / "checkpoint-3")
        return 137

    monkeypatch.setattr(process, "start", failing)
    done = tunesmith("pipeline", file, "rm.lora_rank=8", check=False)
    assert done.returncode == 137
    assert f"Go on with:\n  tunesmith pipeline {file} rm.lora_rank=8" in done.stderr
    assert trained(started) == ["pt", "sft"]
    assert (folder / "pipeline.html").is_file() and not (folder / "rm").exists()

    monkeypatch.setattr(process, "start", whole)
    done = tunesmith("pipeline", file, "rm.lora_rank=8")
    assert [call[1:] for call in started if call[0] == "train"] == [
        [str(folder / "sft.yaml"), "resume_from_checkpoint=auto"], [str(folder / "rm.yaml")]
    ]  # fmt: skip
    assert f"resuming from {folder / 'sft'}/checkpoint-2" in done.stdout


def test_nothing_is_begun_where_anything_is_wrong(
    file: Path, started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = tunesmith("pipeline", file, "sft.learnng_rate=1", "rm.packing=true", check=False)
    assert done.returncode == 2
    assert "sft.learnng_rate: unknown key" in done.stderr and "rm.packing: rows are not packed" in done.stderr
    done = tunesmith("pipeline", file, "--only", "rm", check=False)
    assert "rm: needs sft, which has not finished and is not to be run now" in done.stderr
    done = tunesmith("pipeline", file, "pt.dataset_dir=none", "rm.dataset=rows", "--dry-run", check=False)
    assert done.returncode == 1
    assert "pt: error: " in done.stdout and "rm: error: " in done.stdout
    assert started == []
    monkeypatch.setattr(process, "start", lambda arguments, keep=(): 1)
    done = tunesmith("pipeline", file, check=False)
    assert done.returncode == 1 and "no stage was begun" in done.stderr
    assert not (tmp_path / "all/pt").exists()


def test_a_stage_made_otherwise_is_not_touched_unless_asked(file: Path, started: list[list[str]], tmp_path: Path) -> None:
    few = ["max_steps=1", "sft.sample_prompts=[]"]
    tunesmith("pipeline", file, *few, "--only", "pt")
    assert trained(started) == ["pt"]
    tunesmith("pipeline", file, *few)
    assert trained(started) == ["sft", "rm"]

    done = tunesmith("pipeline", file, *few, "sft.learning_rate=0.02", check=False)
    assert done.returncode == 2 and trained(started) == []
    assert "sft: " in done.stderr and "learning_rate: 0.01 then, 0.02 now" in done.stderr
    assert "rm: " in done.stderr and "results of sft" in done.stderr
    data = tmp_path / "data/texts.jsonl"
    before = data.read_text(encoding="utf-8")
    data.write_text(before.replace("cat", "dog"), encoding="utf-8")
    assert "made with other data" in tunesmith("pipeline", file, *few, check=False).stderr
    data.write_text(before, encoding="utf-8")

    tunesmith("pipeline", file, *few, "--from", "sft", "sft.learning_rate=0.02", "overwrite_output_dir=true")
    assert trained(started) == ["sft", "rm"]
    tunesmith("pipeline", file, *few, "sft.learning_rate=0.02")
    assert trained(started) == []


def test_a_changed_reward_function_is_another_setting(file: Path, tmp_path: Path) -> None:
    """Two plans, without a run: a stage is compared with what was written down of its making."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def short(prompts, responses): return [-len(r) for r in responses]\n", encoding="utf-8")
    stages = [{"name": "policy", "stage": "grpo", "dataset": "rows", "reward_functions": {f"{rewards}:short": 1.0}}]
    values = {**yaml.safe_load(file.read_text(encoding="utf-8")), "per_device_train_batch_size": 8, "stages": stages}
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    pipeline = load_pipeline(file)
    (task,) = plan(pipeline, State(pipeline.folder, str(file)))
    assert task.record is not None
    state = State(pipeline.folder, str(file), {"policy": task.record})
    task.stage.run.mkdir(parents=True)
    assert [task.action for task in plan(pipeline, state)] == ["resume"]
    rewards.write_text(rewards.read_text(encoding="utf-8").replace("-len", "len"), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"policy: .* made with other settings \(SHA-256 of .*rewards.py: .* then, .* now\)"
    ):
        plan(pipeline, state)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_in_the_middle_it_ends_as_if_it_had_not_been(file: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "all", tmp_path / "broken"
    changes = ["max_steps=300", "save_steps=5", "rm.max_steps=3", "pt.max_steps=3"]
    tunesmith_process("pipeline", file, *changes)
    command = [sys.executable, "-m", "tunesmith", "pipeline", str(file), *changes, f"output_dir={broken}"]

    stderr = stopped_at(7, command, broken / "sft", signal.SIGTERM, 143)
    assert "Go on with:" in stderr
    assert (broken / "sft/checkpoint-5").is_dir() and not (broken / "rm").exists()
    stopped_at(50, command, broken / "sft", signal.SIGKILL, -9)
    deadline = time.monotonic() + 120  # the stage goes on alone, and holds the folder until it has ended
    refused = 0
    while "at work here" in tunesmith_process(*command[3:], "--only", "pt", check=False).stderr:
        refused += 1
        assert time.monotonic() < deadline
    assert refused
    tunesmith_process(*command[3:])
    for name in BEGUN:
        one, two = (load_file(folder / name / "adapter_model.safetensors") for folder in (whole, broken))
        assert one.keys() == two.keys()
        assert all((one[key] == two[key]).all() for key in one)


def stopped_at(step: int, command: list[str], run: Path, number: int, status: int) -> str:
    """Start the pipeline, send it a signal when a stage has come so far, and return what it said."""
    said = run.parent.parent / "stderr.txt"
    with said.open("w") as sink:  # and no pipe: a stage that outlives the pipeline would hold it open
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(read_log(run)) < step:
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(60) == status, said.read_text()
    return said.read_text()
