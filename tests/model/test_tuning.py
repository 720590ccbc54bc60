"""What is trained: which parameters, in which type, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tunesmith.config.arguments import FinetuningArguments, ModelArguments
from tunesmith.errors import ConfigError
from tunesmith.model.adapter import beneath_of, trainable_parameters
from tunesmith.model.forward import FlatForward
from tunesmith.model.load import load_base_model
from tunesmith.model.targets import linear_layers, resolve_targets
from tunesmith.model.trial import small_logits, try_adapter
from tunesmith.model.tuning import init_adapter


@pytest.fixture
def base(tiny_model: Path) -> Iterator[PreTrainedModel]:
    torch.manual_seed(0)
    yield AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)


def trained(base: PreTrainedModel, **values: Any) -> set[str]:
    names = trainable_parameters(init_adapter(base, FinetuningArguments(**values), "base"))
    assert all(parameter.dtype == torch.float32 for parameter in names.values())
    return set(names)


def test_all_linear_layers_but_the_head(base: PreTrainedModel) -> None:
    names = [name for name, _ in linear_layers(base)]
    assert len(names) == 14
    assert "lm_head" not in names
    adapted = {name.rpartition(".lora_")[0].removeprefix("base_model.model.") for name in trained(base)}
    assert adapted == set(names)


@pytest.mark.parametrize(
    ("target", "count"),
    [("q_proj", 2), ("q_proj,v_proj", 4), ("self_attn.q_proj", 2), ("layers.1.mlp.up_proj", 1), ("embed_tokens", 1),
     (r"model\.layers\.0\..*_proj", 7), (r".*\.layers\.(0|1)\.mlp\.(up|down)_proj", 4)],
)  # fmt: skip
def test_targets(base: PreTrainedModel, target: str, count: int) -> None:
    assert len(trained(base, lora_target=target)) == 2 * count


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("q_prj", "did you mean 'q_proj'"),
        ("c_attn", "this model has"),
        ("(q_proj", "no regular expression"),
        (".*xx", "fits no layer"),
    ],
)
def test_targets_that_do_not_exist(base: PreTrainedModel, target: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve_targets(base, (target,))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_layer_trainable": 1}, {"1.self_attn", "1.mlp", "1.input_layernorm", "1.post_attention_layernorm"}),
        ({"num_layer_trainable": -1, "name_module_trainable": "mlp"}, {"0.mlp"}),
        ({"num_layer_trainable": 2, "name_module_trainable": "q_proj,mlp"}, {"0.self_attn", "1.self_attn", "0.mlp", "1.mlp"}),
        (
            {"num_layer_trainable": -1, "name_module_trainable": "q_proj,all"},
            {"0.self_attn", "0.mlp", "0.input_layernorm", "0.post_attention_layernorm"},
        ),
    ],
)
def test_freeze_trains_the_layers_asked_for(base: PreTrainedModel, values: dict[str, Any], expected: set[str]) -> None:
    names = trained(base, finetuning_type="freeze", **values)
    assert {".".join(name.split(".")[2:4]) for name in names} == expected
    assert base.dtype == torch.bfloat16


def test_freeze_with_modules_outside_the_layers(base: PreTrainedModel) -> None:
    names = trained(
        base, finetuning_type="freeze", name_module_trainable="mlp", freeze_extra_modules="norm,embed_tokens,lm_head"
    )
    assert {"model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"} <= names
    assert len(names) == 6 + 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_layer_trainable": 3}, "the model has 2 layers"),
        ({"num_layer_trainable": 0}, "the model has 2 layers"),
        ({"name_module_trainable": "mpl"}, "did you mean 'mlp'"),
        ({"freeze_extra_modules": "lmhead"}, "did you mean 'lm_head'"),
    ],
)
def test_freeze_of_what_is_not_there(base: PreTrainedModel, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(base, finetuning_type="freeze", **values)


def test_modules_trained_whole(base: PreTrainedModel) -> None:
    names = trained(base, lora_target="q_proj", additional_target="lm_head")
    assert sum("modules_to_save" in name for name in names) == 1
    with pytest.raises(ConfigError, match="additional_target"):
        trained(base, additional_target="head")


@pytest.mark.parametrize("method", ["ia3", "vera", "oft", "loha", "lokr", "randlora"])
def test_other_methods_by_name(base: PreTrainedModel, method: str) -> None:
    args: dict[str, Any] = {"oft": {"oft_block_size": 16, "r": 0}}.get(method, {})
    if method == "ia3":
        args = {"feedforward_modules": ["down_proj"]}
    names = trained(base, finetuning_type="peft", peft_method=method, peft_args=args, lora_target="q_proj,down_proj")
    assert names


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_method": "lohaa"}, "did you mean 'loha'"),
        ({"peft_method": "prefix_tuning"}, "virtual tokens"),
        ({"peft_method": "loha", "peft_args": {"rr": 3}}, "no option 'rr'"),
        ({"peft_method": "lora", "peft_args": {"inference_mode": True}}, "inference_mode: follows from the other settings"),
        ({"peft_method": "lora", "peft_args": {"init_lora_weights": "pissa"}}, "finetuning_type: lora and pissa_init: true"),
        ({"peft_method": "adalora"}, "adalora spreads its ranks after every update"),
        (
            {"peft_method": "lora", "peft_args": {"alora_invocation_tokens": [1]}},
            "alora_invocation_tokens: .* rows .* end to end",
        ),
        ({"peft_method": "lora", "peft_args": {"layer_replication": [[0, 2], [0, 2]]}}, "layer_replication: .* more layers"),
        ({"peft_method": "lora", "peft_args": {"monteclora_config": {}}}, "monteclora_config: .* a loss of its own"),
        ({"peft_method": "adamss", "peft_args": {"use_asa": True}}, "use_asa: .* after every update"),
    ],
)
def test_methods_that_cannot_be_used(base: PreTrainedModel, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trained(base, finetuning_type="peft", **values)


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (None, {"finetuning_type": "peft", "peft_method": "poly"}, "peft_method: poly: cannot be trained on LlamaForCausalLM"),
        (4, {"finetuning_type": "peft", "peft_method": "loha"}, "with quantization_bit: RuntimeError"),
        (8, {"finetuning_type": "peft", "peft_method": "hra"}, "does not know weights of few bits"),
        (8, {"finetuning_type": "peft", "peft_method": "loha"}, None),
        (8, {"use_dora": True}, "use_dora: cannot be trained"),
        (4, {"use_dora": True}, None),
    ],
)
def test_what_cannot_be_trained_is_found_by_trying(
    shared: Path, bits: int | None, values: dict[str, Any], words: str | None
) -> None:
    args = ModelArguments(model_name_or_path=str(shared / "models" / "stories260K"), quantization_bit=bits)
    base = load_base_model(args, torch.float32, torch.device("cpu"))
    before = small_logits(FlatForward(base, segments=False), torch.float32)
    model = init_adapter(base, FinetuningArguments(**values), "base")
    with nullcontext() if words is None else pytest.raises(ConfigError, match=words):
        try_adapter(FlatForward(model, segments=False), torch.float32, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_train(base: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="trains nothing"):
        trained(base, finetuning_type="none")


def test_pissa_changes_nothing_at_first(tiny_model: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    expected = plain(ids).logits
    tuned = init_adapter(plain, FinetuningArguments(pissa_init=True, pissa_iter=-1, lora_rank=4), "base").eval()
    torch.testing.assert_close(tuned(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert len(beneath_of(tuned)) == 1
