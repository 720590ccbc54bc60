"""Layers through the kernel against the same layers through PEFT's forward: losses, every gradient, and who takes which way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tests.conftest import SHARED
from tunesmith.config.load import load_config
from tunesmith.model import lora_kernel
from tunesmith.model.adapter import trainable_parameters
from tunesmith.model.lora_kernel import _Lora, remove_lora_kernel
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter
from tunesmith.train.trainer import PeftTrainer

# what is asked for, and how many nodes the two layers of the tiny model run as (query, key, value; out; gate, up; down)
FAST: dict[str, tuple[dict[str, Any], int]] = {
    "lora": ({}, 8),
    "rsLoRA": ({"use_rslora": True}, 8),
    "PiSSA": ({"pissa_init": True}, 8),
    "some layers": ({"lora_target": "q_proj,v_proj,down_proj"}, 4),
    "adapter on the head": ({"lora_target": "q_proj,lm_head"}, 4),  # the head runs again in the backward pass
    "recomputed": ({"gradient_checkpointing": True}, 8),
    "nf4": ({"quantization_bit": 4}, 8),
    "packed": ({"packing": True}, 8),
    "padded": ({"attn_implementation": "sdpa"}, 8),
}
PLAIN: dict[str, dict[str, Any]] = {
    "dropout": {"lora_dropout": 0.1},
    "DoRA": {"use_dora": True},
    "int8": {"quantization_bit": 8},
    "full": {"finetuning_type": "full"},
    "another method": {"finetuning_type": "peft", "peft_method": "vera"},
}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each node that ran had."""
    ran: list[int] = []
    apply = _Lora.apply

    def counted(x: torch.Tensor, bases: Any, *rest: Any) -> Any:
        ran.append(len(bases))
        return apply(x, bases, *rest)

    monkeypatch.setattr(lora_kernel._Lora, "apply", counted)
    return ran


def prepared(config: Any) -> PeftTrainer:
    trainer, _ = build_trainer(config, SilentReporter())
    trainer.model.train()
    torch.manual_seed(0)
    for name, parameter in trainable_parameters(trainer.model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return trainer


def loss_and_gradients(trainer: PeftTrainer) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of dropout
    batch = next(iter(trainer.loader.windows(0)))[0]
    loss = trainer.compute_loss(batch).sum
    loss.backward()
    found = {name: p.grad for name, p in trainable_parameters(trainer.model).items() if p.grad is not None}
    trainer.model.zero_grad()
    return {"loss": loss.detach(), **found}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert one.keys() == other.keys() and len(one) > 1
    for name, value in other.items():
        assert (one[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(("changes", "expected"), FAST.values(), ids=list(FAST))
def test_equal_to_peft(
    settings: dict[str, Any], write_config: Any, nodes: list[int], changes: dict[str, Any], expected: int
) -> None:
    trainer = prepared(load_config(write_config({**settings, **changes}))[0])
    nodes.clear()
    mine = loss_and_gradients(trainer)
    assert len(nodes) == expected * (2 if "gradient_checkpointing" in changes else 1)
    remove_lora_kernel(trainer.model)
    nodes.clear()
    assert_equal(mine, loss_and_gradients(trainer))
    assert not nodes


@pytest.mark.parametrize("changes", PLAIN.values(), ids=list(PLAIN))
def test_what_is_not_plain_lora_runs_as_peft_has_it(
    settings: dict[str, Any], write_config: Any, nodes: list[int], changes: dict[str, Any]
) -> None:
    trainer = prepared(load_config(write_config({**settings, **changes}))[0])
    mine = loss_and_gradients(trainer)
    assert not nodes
    remove_lora_kernel(trainer.model)
    theirs = loss_and_gradients(trainer)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize("name", ["-qwen2", "-phi3", "-gemma", "-mixtral"])
def test_every_architecture(settings: dict[str, Any], write_config: Any, nodes: list[int], name: str) -> None:
    path = str(SHARED / f"models/stories260K{name}")
    trainer = prepared(load_config(write_config({**settings, "template": "chatml", "model_name_or_path": path}))[0])
    nodes.clear()
    mine = loss_and_gradients(trainer)
    assert max(nodes) == (1 if name == "-phi3" else 3)  # query, key and value are one matrix in Phi-3
    remove_lora_kernel(trainer.model)
    assert_equal(mine, loss_and_gradients(trainer))


def test_bf16_gradients_are_as_near_to_float32_as_pefts(settings: dict[str, Any], write_config: Any) -> None:
    exact = loss_and_gradients(prepared(load_config(write_config(settings))[0]))
    trainer = prepared(load_config(write_config({**settings, "compute_dtype": "bf16"}))[0])
    mine = loss_and_gradients(trainer)
    remove_lora_kernel(trainer.model)
    theirs = loss_and_gradients(trainer)
    assert all(value.dtype == torch.float32 for value in mine.values())

    def error(found: dict[str, torch.Tensor]) -> float:
        return sum(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact) / len(exact)

    assert error(mine) < 1.2 * error(theirs) < 0.1


def test_adapters_can_be_switched_off_changed_and_copied(settings: dict[str, Any], write_config: Any, nodes: list[int]) -> None:
    trainer = prepared(load_config(write_config(settings))[0])
    model: Any = trainer.model
    model.eval()
    batch = next(iter(trainer.loader.windows(0)))[0]

    def logits(of: Any = model) -> torch.Tensor:
        with torch.no_grad():
            return of(input_ids=batch.input_ids_T[None, : batch.lengths[0]], use_cache=False).logits

    remove_lora_kernel(plain := copy.deepcopy(model))
    model.base_model.model.set_attn_implementation("sdpa")
    plain.base_model.model.set_attn_implementation("sdpa")
    own = logits()
    torch.testing.assert_close(own, logits(plain))
    nodes.clear()
    with model.disable_adapter():
        base = logits()
        assert not nodes and (base - own).abs().max() > 1e-2
    copied = copy.deepcopy(model)
    for parameter in trainable_parameters(copied).values():
        parameter.data.zero_()
    torch.testing.assert_close(logits(copied), base)
    assert torch.equal(logits(), own)
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    nodes.clear()
    torch.testing.assert_close(logits(), base)  # a new adapter changes nothing
    assert nodes
    model.base_model.set_adapter(["default", "second"])
    nodes.clear()
    torch.testing.assert_close(logits(), own)
    assert not nodes  # two at once are PEFT's
    model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(logits(), own, rtol=1e-4, atol=1e-4)
    assert not nodes


def test_hooks_on_the_parts_of_a_layer_run(settings: dict[str, Any], write_config: Any) -> None:
    trainer = prepared(load_config(write_config(settings))[0])
    layers: Any = [m for m in trainer.model.modules() if isinstance(m, LoraLayer)]
    seen: list[torch.nn.Module] = []
    parts = [layers[0].get_base_layer(), layers[1].lora_A["default"], layers[2].lora_B["default"]]
    for part in parts:
        part.register_forward_hook(lambda module, inputs, output: seen.append(module))
    loss_and_gradients(trainer)
    assert seen == parts


def test_the_function_has_the_derivatives_it_says() -> None:
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.nn.Linear(5, out, bias=out == 4, dtype=torch.float64).requires_grad_(False) for out in (4, 3))
    shapes = [(6, 5), (2, 5), (4, 2), (1, 5), (3, 1)]
    x, *factors = (torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(lambda x, *f: _Lora.apply(x, [one, two], [0.5, 2.0], *f), (x, *factors))
    y = _Lora.apply(x, [one, two], [0.5, 2.0], *factors)[1]
    torch.testing.assert_close(y, two(x) + 2 * x @ factors[2].t() @ factors[3].t())
