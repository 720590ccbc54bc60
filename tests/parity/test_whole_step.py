"""Loss and every adapter gradient of a step against transformers and PEFT alone, one row at a time, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from tests.conftest import SHARED, make_rows, make_tokenizer, write_dataset
from tunesmith.config.load import load_config
from tunesmith.model.adapter import trainable_parameters
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1, "sliding_window": 12, "bos_token_id": None,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "window": lambda **ids: MistralForCausalLM(MistralConfig(**SIZES, **ids)),
    "bounded scores and logits": lambda **ids: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **ids, attn_logit_softcapping=3.0, final_logit_softcapping=4.0, query_pre_attn_scalar=16)
    ),
    "experts": None,
}


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "experts":
        if not SHARED.is_dir():
            pytest.skip(f"needs the shared data folder {SHARED}, which is absent")
        return str(SHARED / "models/stories260K-mixtral")
    tokenizer = make_tokenizer(tmp_path / "model")
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    MODELS[request.param](**ids).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("folder", MODELS, indirect=True)
def test_loss_and_adapter_gradients(
    folder: str, packing: bool, settings: dict[str, Any], write_config: Any, tmp_path: Path
) -> None:
    settings |= {"model_name_or_path": folder, "template": "chatml", "packing": packing, "cutoff_len": 128}
    write_dataset(tmp_path / "more", make_rows(12))
    trainer, _ = build_trainer(
        load_config(write_config({**settings, "dataset_dir": str(tmp_path / "more")}))[0], SilentReporter()
    )
    assert trainer.given.forward.segments
    torch.manual_seed(1)
    adapters = trainable_parameters(trainer.model)
    for name, parameter in adapters.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = next(iter(trainer.loader.windows(0)))[0]
    assert max(batch.lengths) > 2 * SIZES["sliding_window"] and len(batch.lengths) >= 4
    trainer.model.train()
    output = trainer.compute_loss(batch)
    loss = output.sum / output.count
    loss.backward()

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    bare = get_peft_model(base, trainer.model.peft_config["default"]).train()
    theirs = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    assert theirs.keys() == adapters.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(adapters[name])
    total = torch.zeros(())
    learned = dict(zip(batch.positions_S.tolist(), batch.targets_S.tolist(), strict=True))
    for start, length in zip(torch.tensor((0, *batch.lengths)).cumsum(0).tolist(), batch.lengths, strict=False):
        logits = bare(input_ids=batch.input_ids_T[start : start + length][None]).logits[0]
        targets = torch.tensor([learned.get(start + place, -100) for place in range(length)])
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    expected = total / len(learned)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in theirs.items():
        assert parameter.grad is not None and adapters[name].grad is not None
        assert (adapters[name].grad - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name
