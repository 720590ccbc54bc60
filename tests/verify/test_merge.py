"""The proof of a merge: in a fresh process, without a module of ours, and able to fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import tunesmith
from tunesmith.errors import ModelError
from tunesmith.model.builtin import fetch
from tunesmith.model.tokenizer import read_tokenizer
from tunesmith.train.finished import Finished, open_finished
from tunesmith.verify import plain
from tunesmith.verify.merge import Check, in_fresh_process, judge, verify_merge

FOUND = {
    "tokenizer": "auto",
    "export": {"max": 2e-5, "relative": 1e-6},
    "merged": {"max": 2e-5, "relative": 1e-6},
    "largest_logit": 5.0,
    "agree": 4,
    "prompts": 4,
    "missing": [],
    "unexpected": [],
}


@pytest.fixture
def run(settings: dict[str, Any], write_config: Any) -> Path:
    tunesmith("train", write_config({**settings, "max_steps": 1}))
    return Path(settings["output_dir"])


def test_export_by_the_command_line_in_a_fresh_process(run: Path, tmp_path: Path) -> None:
    done = tunesmith("export", run, "--output", tmp_path / "out")
    assert "merged in fp32: greatest difference" in done.stdout
    assert "written and reloaded: greatest difference" in done.stdout
    assert "4 of 4 prompts the same" in done.stdout
    assert done.stdout.splitlines()[-1] == f"exported to {tmp_path / 'out'}"
    proof = json.loads((tmp_path / "out" / "export.json").read_text(encoding="utf-8"))["proof"]
    assert 0 < proof["export"]["max"] <= 1e-4


def test_another_adapter_than_was_merged_is_found(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    finished = open_finished(run)
    check = Check(finished, read_tokenizer(str(run)), tmp_path)
    check.note(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    proof = judge(plain.compare(check.asked(tiny_model)), "fp32")
    assert [problem.partition(" differs")[0] for problem in proof.problems] == ["the merged model", "what was written"]
    weights = load_file(tiny_model / "model.safetensors")
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(other)
    read_tokenizer(str(run)).save_pretrained(other)
    weights.pop("model.norm.weight")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    whole = Finished(tiny_model, None, (), None, None)
    proof = judge(plain.compare(Check(whole, read_tokenizer(str(run)), tmp_path / "none").asked(other)), "fp32")
    assert any("weights missing from the export: ['model.norm.weight']" in problem for problem in proof.problems)


@pytest.mark.parametrize(
    ("changes", "dtype", "tolerance", "problems"),
    [
        ({}, "fp32", None, 0),
        ({"merged": {"max": 2e-4, "relative": 0}}, "fp32", None, 1),
        ({"export": {"max": 2e-4, "relative": 0}}, "fp32", None, 1),
        ({"export": {"max": 2e-4, "relative": 0}}, "fp32", 3e-4, 0),
        ({"export": {"max": 2e-4, "relative": 0}, "largest_logit": 40.0}, "fp32", None, 0),
        ({"export": {"max": 5e-4, "relative": 0}, "largest_logit": 40.0}, "fp32", None, 1),
        ({"export": {"max": 1.0, "relative": 0.019}}, "bf16", None, 0),
        ({"export": {"max": 1.0, "relative": 0.021}}, "bf16", None, 1),
        ({"export": {"max": 1.0, "relative": 0.019}}, "fp16", None, 1),
        ({"export": {"max": float("nan"), "relative": float("nan")}}, "bf16", None, 1),
        ({"unexpected": ["x"]}, "fp32", None, 1),
        ({"tokenizer": "fast"}, "fp32", None, 0),
        ({"tokenizer": "neither"}, "fp32", None, 1),
    ],
)
def test_tolerances(changes: dict[str, Any], dtype: Any, tolerance: float | None, problems: int) -> None:
    assert len(judge({**FOUND, **changes}, dtype, tolerance).problems) == problems


@pytest.mark.slow
def test_verify_merge_keeps_nothing_and_can_fail(run: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = tunesmith("verify", "merge", run, "--json")
    assert json.loads(done.stdout)["problems"] == []
    done = tunesmith("verify", "merge", run, "--tolerance", "0", check=False)
    assert done.returncode == 1
    assert "differs from base and adapter" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
    check = Check(open_finished(run), read_tokenizer(str(run)), tmp_path)
    with pytest.raises(ModelError, match="plain transformers and PEFT cannot compare it"):
        in_fresh_process(check.asked(tmp_path / "nowhere"))


def test_a_whole_model_has_nothing_to_merge(run: Path, tiny_model: Path) -> None:
    (run / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="nothing to merge"):
        verify_merge(run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_e1_a_real_model(tmp_path: Path) -> None:
    """SmolLM2, stored in bf16, with every linear layer adapted."""
    torch.manual_seed(0)
    base = fetch("smollm2-135m")
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.005)
    tuned.save_pretrained(tmp_path / "adapter")
    output = tmp_path / "out"
    tunesmith("export", tmp_path / "adapter", "--output", output, "--base", "builtin:smollm2-135m", "--ollama")
    proof = json.loads((output / "export.json").read_text(encoding="utf-8"))["proof"]
    assert proof["merged"]["max"] <= 1e-5 * proof["largest_logit"]
    assert 1e-4 < proof["export"]["relative"] < 0.01
    assert AutoModelForCausalLM.from_pretrained(output).dtype == torch.bfloat16
    assert 'TEMPLATE """' in (output / "Modelfile").read_text(encoding="utf-8")
    assert "`builtin:smollm2-135m`" in (output / "README.md").read_text(encoding="utf-8")
