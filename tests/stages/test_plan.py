"""What a run needs is told without weights, decides about recomputing, and stops what cannot fit."""

from __future__ import annotations

import gc
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tunesmith
from tunesmith.config.load import load_config
from tunesmith.data.heaviest import Cost, blank_batch, heaviest
from tunesmith.data.loader import DataLoader
from tunesmith.data.memory import RowsInMemory
from tunesmith.errors import OutOfMemoryError
from tunesmith.model.phantom import LiveBytes
from tunesmith.stages import footprint as footprint_module
from tunesmith.stages import plan
from tunesmith.stages.footprint import footprint
from tunesmith.stages.run import TRAINERS, build_trainer
from tunesmith.train.progress import SilentReporter
from tunesmith.train.trainer import PeftTrainer

CPU = torch.device("cpu")


def trained(settings: dict[str, Any], write_config: Any, **changes: Any) -> PeftTrainer:
    trainer, _ = build_trainer(load_config(write_config({**settings, **changes}))[0], SilentReporter())
    trainer.given.run.mkdir(parents=True)
    return trainer


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora, recomputing": {"gradient_checkpointing": True},
    "full": {"finetuning_type": "full"},
    "full, accumulating": {"finetuning_type": "full", "gradient_accumulation_steps": 2},
    "freeze": {"finetuning_type": "freeze", "num_layer_trainable": 1},
    "padded": {"attn_implementation": "sdpa"},
    "dora": {"use_dora": True},
    "nf4": {"quantization_bit": 4},
    "adafactor": {"finetuning_type": "full", "optim": "adafactor"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_fake_tensors_hold_is_what_real_ones_hold(settings: dict[str, Any], write_config: Any, kind: str) -> None:
    """Against the bytes of an update that is run: every storage counted from its making to its release."""
    compare({**settings, **KINDS[kind]}, write_config)


def compare(settings: dict[str, Any], write_config: Any) -> None:
    settings = {"gradient_checkpointing": False, **settings}
    trainer = trained(settings, write_config)
    window = next(trainer.loader.onward(0, 0, {}))[0]
    batch = max(window, key=lambda one: one.num_tokens)
    trainer.model.train()
    trainer.updater.update(window, trainer.compute_loss, 1)
    gc.collect()
    with LiveBytes() as live:
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            live.count(tensor)
        for state in trainer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    live.count(value)
        trainer.updater.rehearse(batch, trainer.compute_loss, settings.get("gradient_accumulation_steps", 1) > 1)
    measured = max(peak.total() for peak in live.peaks.values())
    config = load_config(write_config(settings))[0]
    planned = footprint(config, TRAINERS[config.finetuning.stage], batch, CPU)
    assert planned.total == pytest.approx(measured, rel=0.06)


def test_few_layers_tell_of_all(settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(settings["model_name_or_path"])
    config_file = folder / "config.json"
    monkeypatch.setattr(footprint_module, "_layers_to_run", lambda *_: None)
    batch = blank_batch((40, 30), 50)
    for values in ({}, {"finetuning_type": "full", "gradient_checkpointing": True}):
        config = load_config(write_config({**settings, **values}))[0]
        before = json.loads(config_file.read_text(encoding="utf-8"))
        try:
            config_file.write_text(json.dumps({**before, "num_hidden_layers": 9, "layer_types": None}), encoding="utf-8")
            every = footprint(config, TRAINERS["sft"], batch, CPU)
            with monkeypatch.context() as patch:
                patch.setattr(footprint_module, "_layers_to_run", lambda *_: (2, 3))
                few = footprint(config, TRAINERS["sft"], batch, CPU)
        finally:
            config_file.write_text(json.dumps(before), encoding="utf-8")
        assert few.total == pytest.approx(every.total, rel=0.01)
        assert few.optimizer == every.optimizer


def test_nothing_is_loaded_and_no_random_number_drawn(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(settings["model_name_or_path"], tmp_path / "model"))
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**told, "attention_dropout": 0.1}), encoding="utf-8")
    config = load_config(write_config({**settings, "model_name_or_path": str(folder)}))[0]
    state = torch.get_rng_state()
    monkeypatch.setattr("safetensors.torch.load_file", None)
    monkeypatch.setattr("safetensors.safe_open", None)
    footprint(config, TRAINERS["sft"], blank_batch((8,), 7), CPU)
    assert torch.equal(state, torch.get_rng_state())


def test_the_heaviest_batch_is_the_one_with_most_tokens() -> None:
    rows = RowsInMemory([row for n in (5, 9, 3, 30, 7, 28, 4, 6) for row in _learned(n)])
    loader = DataLoader(rows, 2, seed=1)
    everything = [batch for epoch in range(3) for window in loader.windows(epoch) for batch in window]
    found = heaviest(loader, 3 * len(loader), Cost(1.0, 0.0, padded=False), 32)
    assert found.num_tokens == max(batch.num_tokens for batch in everything)
    padded = heaviest(loader, 3 * len(loader), Cost(1.0, 0.0, padded=True), 32)
    most = max(len(batch.lengths) * max(batch.lengths) for batch in everything)
    assert len(padded.lengths) * max(padded.lengths) == most


def _learned(length: int) -> list[Any]:
    from tunesmith.data.learned import Learned
    from tunesmith.types import Source

    import numpy as np  # isort: skip

    return [Learned(np.zeros(length, np.int32), ((0, length, 1.0),), Source("rows", "rows", length, length))]


# ---- what follows from it


def test_the_batch_tried_beforehand_changes_nothing(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    rehearse = PeftTrainer._rehearse
    monkeypatch.setattr(PeftTrainer, "_rehearse", lambda self, batch: (tried.append(batch), rehearse(self, batch))[1])
    logs = []
    for roomy in (0.5, 0.0):
        monkeypatch.setattr(plan, "ROOMY", roomy)
        changes = {"output_dir": f"{settings['output_dir']}-{roomy}", "lora_dropout": 0.2, "gradient_accumulation_steps": 2}
        trainer = trained(settings, write_config, **changes, neftune_noise_alpha=5.0)
        trainer.train()
        log = (trainer.given.run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in map(json.loads, log)])
    assert logs[0] == logs[1]
    assert len(tried) == 1


def limited(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda device: limit)
    monkeypatch.setattr(plan, "resident_memory", lambda: 0)


def test_auto_recomputes_where_it_would_not_fit_else(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(write_config(settings))[0]
    batch = blank_batch((60,) * 64, 60)
    monkeypatch.setattr(plan, "resident_memory", lambda: 0)
    stored, recomputed = (
        plan.plan_memory(plan._with(config, gradient_checkpointing=value), TRAINERS["sft"], batch, CPU).peak
        for value in (False, True)
    )
    assert recomputed < stored
    for limit, recomputes in ((stored + 1, False), (stored - 1, True)):
        limited(monkeypatch, limit)
        assert plan.plan_run(config, TRAINERS["sft"], batch, CPU).recomputes is recomputes


def test_what_cannot_fit_is_refused_with_figures(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 30 * 2**20)
    path = write_config({**settings, "gradient_checkpointing": True, "finetuning_type": "full", "max_steps": 1})
    done = tunesmith("train", path, check=False)
    assert done.returncode == 1
    assert "GiB are there" in done.stderr
    assert "per_device_train_batch_size: 2 and gradient_accumulation_steps: 2" in done.stderr
    assert not Path(settings["output_dir"]).exists()
    found = json.loads(tunesmith("check", path, "--json", check=False).stdout)
    assert [entry["code"] for entry in found["errors"]] == ["memory"]
    memory = found["plan"]["memory"]
    assert not memory["fits"]
    assert memory["changes"][0]["set"] == "finetuning_type: lora"
    assert all(change["peak"] < memory["peak"] for change in memory["changes"])
    tunesmith("train", path, "check_memory=false")


def test_check_prints_what_is_needed(settings: dict[str, Any], write_config: Any) -> None:
    path = write_config(settings)
    assert re.search(r"memory: [\d.]+ of [\d.]+ GiB on cpu \(", tunesmith("check", path).stdout)
    memory = json.loads(tunesmith("check", path, "--json").stdout)["plan"]["memory"]
    assert memory["fits"]
    assert memory["peak"] == sum(memory[kind] for kind in (*footprint_module.KINDS, "process", "allocator"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes")])
def test_out_of_memory_says_where_and_what_to_change(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trainer = trained(settings, write_config, save_steps=1)
    compute, calls = trainer.compute_loss, [0]

    def fails(batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise error
        return compute(batch)

    monkeypatch.setattr(trainer, "compute_loss", fails)
    with pytest.raises(OutOfMemoryError, match=r"step 3 \(4 rows, .* gradient_checkpointing: true"):
        trainer.train()
    assert (trainer.given.run / "checkpoint-2").is_dir()


def test_other_errors_pass(settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(settings, write_config)

    def fails(batch: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(trainer, "compute_loss", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        trainer.train()


@pytest.mark.parametrize("changes", [{}, {"packing": True, "cutoff_len": 64}, {"finetuning_type": "full"}])
def test_no_batch_needs_more_than_the_one_that_is_tried(
    settings: dict[str, Any], write_config: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr(plan, "ROOMY", 0.0)
    trainer = trained(settings, write_config, per_device_train_batch_size=2, **changes)
    assert trainer.given.heaviest is not None
    trainer.model.train()
    windows = list(trainer.loader.windows(0))[:5]
    trainer.updater.update(windows[0], trainer.compute_loss, 1)

    def peak(batch: Any) -> int:
        gc.collect()
        with LiveBytes() as live:
            trainer.updater.rehearse(batch, trainer.compute_loss, accumulates=False)
        return max(found.total() for found in live.peaks.values())

    most = peak(trainer.given.heaviest)
    assert all(peak(batch) <= 1.01 * most for window in windows for batch in window)


def test_a_plan_takes_no_longer_for_more_tokens(settings: dict[str, Any], write_config: Any) -> None:
    config = load_config(write_config(settings))[0]
    calls = [0, 0]
    for number, rows in enumerate((4, 64)):
        batch = blank_batch((64,) * rows, 60 * rows)

        class Counted(LiveBytes):
            def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
                calls[number] += 1  # noqa: B023
                return super().__torch_dispatch__(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(footprint_module, "LiveBytes", Counted)
            footprint(config, TRAINERS["sft"], batch, CPU)
    assert calls[1] < 1.3 * calls[0], calls


def test_an_impossible_stream_is_refused_at_once(settings: dict[str, Any], write_config: Any) -> None:
    changes = {"streaming": True, "max_steps": 2, "per_device_train_batch_size": 1_000_000, "cutoff_len": 100_000}
    done = tunesmith("train", write_config({**settings, **changes}), check=False)
    assert done.returncode == 1
    assert "per_device_train_batch_size: 1000000 rows" in done.stderr
