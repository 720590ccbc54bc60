"""Fused layers against the modules that they stand in for: values, every gradient, what is kept, and who is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, SeedOssConfig
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.seed_oss.modeling_seed_oss import SeedOssMLP

from tests.conftest import SHARED
from tests.model.test_lora_kernel import assert_equal, loss_and_gradients, prepared
from tunesmith.config.load import load_config
from tunesmith.model.adapter import count_parameters
from tunesmith.model.fuse import fuse, unfuse
from tunesmith.model.fused import EAGER, Norm
from tunesmith.stages.run import build_trainer
from tunesmith.train.progress import SilentReporter

# architecture -> norms and gated layers found in two layers, and the formula of the norms
FOUND: dict[str, tuple[int, int, tuple[float, bool] | None]] = {
    "llama": (5, 2, (0.0, False)),
    "qwen3": (9, 2, (0.0, False)),  # of queries and keys, too
    "phi3": (5, 2, (0.0, False)),  # gate and up in one
    "gemma2": (9, 2, (1.0, True)),
    "olmo2": (9, 2, (0.0, True)),
    "mixtral": (5, 0, (0.0, False)),  # experts are no linear layers
    "cohere": (0, 2, None),  # subtracts the mean
    "gpt2": (0, 0, None),
}
CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "norms trained": {"finetuning_type": "full"},
    "recomputed": {"gradient_checkpointing": True},
    "padded": {"attn_implementation": "sdpa"},
    "nf4": {"quantization_bit": 4},  # norms held in fp32
}


def skeleton(kind: str) -> Any:
    config = AutoConfig.for_model(kind)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    for name, value in {**sizes, "num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0}.items():
        setattr(config, name, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


@pytest.mark.parametrize("kind", FOUND)
def test_found_by_what_they_compute(kind: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(skeleton(kind))
    norms, gates, formula = FOUND[kind]
    fused = fuse(model)
    assert (fused.norms, fused.gates) == (norms, gates)
    hows = {place._how for module in model.modules() if (place := module.__dict__.get("forward"))}
    assert {(how.offset, how.late) for how in hows if isinstance(how, Norm)} == ({formula} if formula else set())


class NormBefore(torch.nn.Module):
    """Looks like an RMS norm, and is one of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(8))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps)


class GateBeside(torch.nn.Module):
    """A gated layer that adds its input."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (torch.nn.Linear(8, 8) for _ in range(3))
        self.act = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.act(self.gate(x)) * self.up(x))


def test_what_computes_something_else_is_left_alone() -> None:
    fused = fuse(torch.nn.Sequential(NormBefore(), GateBeside()))
    assert (fused.norms, fused.gates) == (0, 0)


@pytest.mark.parametrize("sparsity", [[0.0, 0.95], [0.95, 0.0]])
def test_layers_of_one_class_that_differ(sparsity: list[float]) -> None:
    """Gemma 3n drops most of the gate in some layers."""
    config = AutoConfig.for_model("gemma3n_text", hidden_size=8, intermediate_size=12, num_hidden_layers=2)
    config.activation_sparsity_pattern = sparsity
    torch.manual_seed(0)
    layers = torch.nn.Sequential(*(Gemma3nTextMLP(config, number) for number in range(2)))
    x = torch.randn(1, 5, 8)
    expected = layers(x)
    assert fuse(layers).gates == 1
    torch.testing.assert_close(layers(x), expected)


def test_a_layer_that_drops_in_training_is_left_alone() -> None:
    layer = SeedOssMLP(SeedOssConfig(hidden_size=8, intermediate_size=12, residual_dropout=0.5)).eval()
    assert fuse(layer).gates == 0
    assert (layer.train()(torch.randn(4, 8)) == 0).any()


@pytest.mark.parametrize("how", [Norm(1e-5, offset, late) for offset in (0.0, 1.0) for late in (False, True)], ids=str)
def test_gradients_of_the_norm(how: Norm) -> None:
    torch.manual_seed(0)
    x, weight = (
        torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, weight: EAGER.norm(x, weight, how), (x, weight))
    y = EAGER.norm(x, weight, how)
    expected = torch.nn.functional.rms_norm(x, (5,), weight + how.offset, how.eps)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_gradients_of_the_gate(activation: Any) -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda both: EAGER.gated_halves(both, activation), (both,))
    assert torch.autograd.gradcheck(lambda both: EAGER.gated(both[:, :4], both[:, 4:], activation), (both,))


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
def test_a_step_equals_the_librarys(settings: dict[str, Any], write_config: Any, changes: dict[str, Any]) -> None:
    trainer = prepared(load_config(write_config({**settings, **changes}))[0])
    mine = loss_and_gradients(trainer)
    back = unfuse(trainer.model)
    theirs = loss_and_gradients(trainer)
    assert_equal(mine, theirs)
    back()
    assert_equal(loss_and_gradients(trainer), mine, tolerance=0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("", "bf16"), ("-gemma", "bf16"), ("-qwen2", "fp32"), ("-phi3", "fp32"), ("-gemma", "fp32"), ("-mixtral", "fp32")],
)
def test_every_architecture(settings: dict[str, Any], write_config: Any, name: str, dtype: str) -> None:
    path = str(SHARED / f"models/stories260K{name}")
    changes = {"template": "chatml", "model_name_or_path": path, "compute_dtype": dtype}
    trainer = prepared(load_config(write_config({**settings, **changes}))[0])
    mine = loss_and_gradients(trainer)
    unfuse(trainer.model)
    theirs = loss_and_gradients(trainer)
    if dtype == "bf16":  # both round at the same places on the way forwards; backwards, ours not at all
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-3 * theirs["loss"]
    assert_equal(mine, theirs, 1e-5 if dtype == "fp32" else 5e-2)


def test_less_is_kept() -> None:
    """By a norm its input, the weight and one number a row; by a gated layer gate and up."""
    kept: list[tuple[tuple[int, ...], torch.dtype]] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    half = torch.bfloat16
    x = torch.randn(1, 7, 64, dtype=half, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        EAGER.norm(x, torch.ones(64, dtype=half), Norm(1e-6, 0.0, False))
        EAGER.gated(x, x, "silu")
    assert kept == [((7, 64), half), ((64,), half), ((7, 1), torch.float32), ((7, 64), half), ((7, 64), half)]


def test_evaluation_is_the_librarys_to_the_bit(settings: dict[str, Any], write_config: Any) -> None:
    trainer, _ = build_trainer(load_config(write_config(settings))[0], SilentReporter())
    batch = next(iter(trainer.loader.windows(0)))[0]
    with torch.no_grad():
        mine = trainer.given.forward.logits(batch)
        unfuse(trainer.model)
        assert torch.equal(mine, trainer.given.forward.logits(batch))


def test_a_copy_runs_its_own_weights() -> None:
    model = AutoModelForCausalLM.from_config(skeleton("llama"))
    fuse(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert count_parameters(twin) == count_parameters(model)
    twin(torch.arange(5)[None]).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
