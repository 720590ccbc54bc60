"""Bases in few bits: loaded, trained on, resumed to the bit; foreign formats are named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import tunesmith
from tunesmith.config.arguments import FinetuningArguments, ModelArguments
from tunesmith.errors import ModelError
from tunesmith.model.adapter import count_parameters
from tunesmith.model.load import load_base_model
from tunesmith.model.precision import autocast
from tunesmith.model.quantize import is_quantised
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.model.tuning import init_adapter

BITS: list[dict[str, Any]] = [
    {"quantization_bit": 4},
    {"quantization_bit": 4, "double_quantization": False},
    {"quantization_bit": 4, "quantization_type": "fp4"},
    {"quantization_bit": 8},
]


@pytest.mark.parametrize("values", BITS)
def test_a_quantised_base_is_near_the_whole_one(tiny_model: Path, values: dict[str, Any]) -> None:
    ids = torch.arange(30)[None]
    logits = []
    for given in ({}, values):
        args = ModelArguments(model_name_or_path=str(tiny_model), **given)
        model: Any = load_base_model(args, torch.float32, torch.device("cpu"), load_tokenizer(args))
        assert is_quantised(model) == bool(given)
        with torch.no_grad():
            logits.append(model(ids).logits.float())
    whole, rounded = logits
    assert 1e-4 < (rounded - whole).norm() / whole.norm() < 0.5
    assert model.lm_head.weight.dtype == torch.float32
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if "norm" in name)


@pytest.mark.parametrize("values", BITS[:1] + BITS[3:])
def test_train_and_go_on_to_the_bit(
    settings: dict[str, Any], write_config: Any, tmp_path: Path, values: dict[str, Any]
) -> None:
    config = write_config({**settings, **values, "max_steps": 4, "save_steps": 2, "lora_dropout": 0.1, "num_train_epochs": 9})
    tunesmith("train", config)
    run = Path(settings["output_dir"])
    losses = [json.loads(line)["loss"] for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    tunesmith("train", config, f"output_dir={tmp_path / 'again'}", f"resume_from_checkpoint={run / 'checkpoint-2'}")
    first, again = (load_file(folder / "adapter_model.safetensors") for folder in (run, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = tunesmith("train", config, "quantization_bit=null", f"output_dir={tmp_path / 'other'}",
                      f"resume_from_checkpoint={run / 'checkpoint-2'}", check=False)  # fmt: skip
    assert "quantisation" in other.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_rounded_weights_also_after_an_evaluation(tiny_model: Path, dtype: torch.dtype) -> None:
    """bitsandbytes packs weights for inference at the first evaluation, and packed ones pass no gradient on."""
    args = ModelArguments(model_name_or_path=str(tiny_model), quantization_bit=4)
    ids = torch.arange(3, 43)[None]
    models: list[Any] = []
    for whole in (False, True):
        base: Any = load_base_model(args, dtype, torch.device("cpu"), load_tokenizer(args))
        with torch.no_grad():
            base.eval()(ids)
        if whole:
            base = base.dequantize()
        torch.manual_seed(0)
        tuned: Any = init_adapter(base, FinetuningArguments(lora_rank=2), "base").train()
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        with autocast(torch.device("cpu"), dtype):
            tuned(ids, labels=ids).loss.backward()
        models.append(tuned)
    for (name, rounded), (_, plain) in zip(*(model.named_parameters() for model in models), strict=True):
        if rounded.requires_grad:
            difference = (rounded.grad - plain.grad).norm() / plain.grad.norm()
            assert plain.grad.norm() > 0
            assert difference < (1e-4 if dtype == torch.float32 else 0.05), (name, difference)


def test_parameters_are_counted_as_they_are_not_as_they_are_packed(tiny_model: Path) -> None:
    counts = []
    for given in ({}, BITS[0]):
        args = ModelArguments(model_name_or_path=str(tiny_model), **given)
        counts.append(count_parameters(load_base_model(args, torch.float32, torch.device("cpu"), load_tokenizer(args)))[1])
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("values", "words"), [
    ({"quantization_bit": 4, "finetuning_type": "full"}, "cannot be trained by finetuning_type: full"),
    ({"quantization_type": "fp4"}, "without quantization_bit"),
    ({"quantization_bit": 8, "pissa_init": True}, "pissa_init"),
    ({"quantization_bit": 3}, "quantization_bit"),
])  # fmt: skip
def test_settings_that_do_not_go_together(
    settings: dict[str, Any], write_config: Any, values: dict[str, Any], words: str
) -> None:
    assert words in tunesmith("train", write_config({**settings, **values}), check=False).stderr


@pytest.mark.parametrize("method", ["gptq", "awq", "newest"])
def test_formats_whose_library_is_missing_are_named(tiny_model: Path, tmp_path: Path, method: str) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": method, "bits": 4, "group_size": 128}}))
    args = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    with pytest.raises(ModelError, match=f"quantised by {method}"):
        load_base_model(args, torch.float32, torch.device("cpu"), load_tokenizer(args))


def test_quantised_twice_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}}))
    args = ModelArguments(model_name_or_path=str(tmp_path / "model"), quantization_bit=4)
    with pytest.raises(ModelError, match="already quantised"):
        load_base_model(args, torch.float32, torch.device("cpu"), load_tokenizer(args))
