"""Six architectures of one function: adapters on all linear layers train, are saved, loaded, and go on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import SHARED, tunesmith
from tunesmith.config.load import load_config
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.serve.chat import load_tuned

pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
MODELS = [
    "stories260K",
    "stories260K-mistral",
    "stories260K-qwen2",
    "stories260K-phi3",
    "stories260K-gemma",
    "stories260K-mixtral",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("Once upon a time there was a little dog. He liked to play in the park with his friend Tom.\n" * 12)
    return file


@pytest.mark.parametrize("name", MODELS)
def test_train_save_go_on_load(name: str, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    model = SHARED / "models" / name
    values: dict[str, Any] = {
        "model_name_or_path": str(model), "stage": "pt", "dataset": str(text), "cutoff_len": 32, "compute_dtype": "fp32",
        "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01, "plot_loss": False,
        "output_dir": str(tmp_path / "run"),
    }  # fmt: skip
    config.write_text(json.dumps(values))
    tunesmith("train", config)
    run = tmp_path / "run"
    losses = [json.loads(line)["loss"] for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    shaped = load_file(run / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for key, tensor in shaped.items() if "lora_B" in key)
    assert any(("gate" in key or "experts" in key) for key in shaped)  # the feed-forward part is adapted too

    again = tmp_path / "again"
    tunesmith("train", config, f"output_dir={again}", "max_steps=3", f"resume_from_checkpoint={run / 'checkpoint-1'}")
    resumed = load_file(again / "adapter_model.safetensors")
    assert all(torch.equal(shaped[key], resumed[key]) for key in shaped)

    settings, _ = load_config(run / "config.yaml")
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        ours = load_tuned(run, settings.model, read_tokenizer(run), torch.float32, torch.device("cpu"))(ids).logits
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        before = base(ids).logits
        theirs = PeftModel.from_pretrained(base, run).eval()(ids).logits
    assert torch.equal(ours, theirs)
    assert (theirs - before).abs().max() > 1e-3
