"""Log-probabilities from hidden states against those of all logits: values and every gradient, whatever the head is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import SHARED
from tunesmith.config.load import load_config
from tunesmith.losses.cross_entropy import token_nll
from tunesmith.model.adapter import trainable_parameters
from tunesmith.stages.run import build_trainer
from tunesmith.stages.scores import batch_logprobs, batch_scores
from tunesmith.train.progress import SilentReporter

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "adapter on the head": {"lora_target": "q_proj,lm_head"},
    "head trained beside the adapter": {"additional_target": "lm_head"},
    "full": {"finetuning_type": "full"},
    "head alone": {"finetuning_type": "freeze", "num_layer_trainable": 1, "freeze_extra_modules": "lm_head"},
    "nf4": {"quantization_bit": 4},
    "rows of new tokens": {"add_tokens": "<new>"},
    "padded": {"attn_implementation": "sdpa"},
    "recomputed": {"gradient_checkpointing": True},
}
ARCHITECTURES = ["", "-mistral", "-qwen2", "-phi3", "-gemma", "-mixtral"]


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in trainable_parameters(model).items() if p.grad is not None}
    model.zero_grad()
    return found


def compare(config: Any) -> None:
    trainer, _ = build_trainer(config, SilentReporter())
    assert trainer.given.output is not None
    trainer.model.train()
    torch.manual_seed(0)
    for name, parameter in trainable_parameters(trainer.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    batch = next(iter(trainer.loader.windows(0)))[0]
    factors = torch.randn(batch.num_targets)
    found = batch_logprobs(trainer.given, batch)
    (found * factors).sum().backward()
    mine = gradients(trainer.model)
    logits = trainer.given.forward.logits(batch)
    expected = -token_nll(logits, batch.targets_S)
    (expected * factors).sum().backward()
    theirs = gradients(trainer.model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert mine.keys() == theirs.keys() and len(mine) > 0
    for name, gradient in theirs.items():
        assert (mine[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    scores, first = batch_scores(trainer.given, batch)
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(first, logits.argmax(-1) == batch.targets_S)


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
def test_hidden_states_and_head_give_what_logits_give(
    settings: dict[str, Any], write_config: Any, changes: dict[str, Any]
) -> None:
    compare(load_config(write_config({**settings, **changes}))[0])


@pytest.mark.parametrize("finetuning", ["lora", "full", "freeze"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_stays_near_float32(settings: dict[str, Any], write_config: Any, finetuning: str, dtype: str) -> None:
    """The whole step, attention and adapters included; fp16 under its loss scale."""
    results = []
    for compute in ("fp32", dtype):
        values = {**settings, "finetuning_type": finetuning, "compute_dtype": compute, "max_steps": 3, "learning_rate": 1e-4}
        trainer, _ = build_trainer(load_config(write_config(values))[0], SilentReporter())
        trainer.model.train()
        window = next(iter(trainer.loader.windows(0)))
        steps = [trainer.training_step(window) for _ in range(3)]
        assert not any(step.skipped for step in steps)
        results.append([(step.loss_sum / step.count, step.grad_norm) for step in steps])
    torch.testing.assert_close(torch.tensor(results[1]), torch.tensor(results[0]), rtol=3e-2, atol=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(settings: dict[str, Any], write_config: Any, name: str) -> None:
    template = {"template": "chatml"}
    path = str(SHARED / f"models/stories260K{name}")
    compare(load_config(write_config({**settings, **template, "model_name_or_path": path}))[0])


def test_a_batch_without_targets_has_no_gradient(settings: dict[str, Any], write_config: Any) -> None:
    trainer, _ = build_trainer(load_config(write_config(settings))[0], SilentReporter())
    batch = next(iter(trainer.loader.windows(0)))[0]
    empty = replace(batch, positions_S=batch.positions_S[:0], targets_S=batch.targets_S[:0])
    logps = batch_logprobs(trainer.given, empty)
    assert logps.shape == (0,)
    logps.sum().backward()
    assert all(not gradient.any() for gradient in gradients(trainer.model).values())
