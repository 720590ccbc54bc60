"""What a model does behind its hidden states is found, and where it is not, that is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from tunesmith.model.attention import register
from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.model.output import Output, find_output, head_matrix, output_head

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
CASES: list[tuple[type[PreTrainedModel], Any, Output]] = [
    (LlamaForCausalLM, LlamaConfig(**SIZES), Output()),
    (Gemma2ForCausalLM, Gemma2Config(**SIZES, final_logit_softcapping=30.0), Output(1.0, 30.0)),
    (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0), Output(0.125)),
    (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.0625), Output(0.0625)),
]


def tiny(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    register()
    return kind(copy.deepcopy(config)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "config", "expected"), CASES, ids=[case[0].__name__ for case in CASES])
def test_scale_and_cap_are_found(kind: type[PreTrainedModel], config: Any, expected: Output, dtype: torch.dtype) -> None:
    model = tiny(kind, config, dtype)
    assert find_output(FlatForward(model, segments=False), dtype) == (expected, "")
    if segments_work(model)[0]:
        assert find_output(FlatForward(model, segments=True), dtype) == (expected, "")


class Shifted(LlamaForCausalLM):
    """Adds to the logits what no scale and no cap gives."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(output.logits.shape[-1])
        return output


class Halved(LlamaForCausalLM):
    """Says that its decoder is something that gives other states than its head is given."""

    def get_decoder(self) -> Any:
        return lambda **inputs: BaseModelOutputWithPast(last_hidden_state=self.model(**inputs).last_hidden_state / 2)


def test_what_is_not_understood_is_refused_with_the_reason() -> None:
    output, reason = find_output(FlatForward(tiny(Shifted, LlamaConfig(**SIZES)), segments=False), torch.float32)
    assert output is None and "not those of its head" in reason
    output, reason = find_output(FlatForward(tiny(Halved, LlamaConfig(**SIZES)), segments=False), torch.float32)
    assert output is None and "other log-probabilities" in reason


def test_methods_that_do_more_than_their_layers_take_the_logits() -> None:
    model = tiny(LlamaForCausalLM, LlamaConfig(**SIZES))
    tuned = get_peft_model(model, AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM"))
    output, reason = find_output(FlatForward(tuned, segments=False), torch.float32)
    assert output is None and "AdaLoraModel" in reason


def test_an_adapted_head_is_no_matrix_and_comes_back_untouched() -> None:
    model = tiny(LlamaForCausalLM, LlamaConfig(**SIZES))
    assert head_matrix(output_head(model)) == (model.lm_head.weight, None)
    tuned = get_peft_model(model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).train()
    assert find_output(FlatForward(tuned, segments=False), torch.float32) == (Output(), "")
    head = output_head(tuned)
    assert head_matrix(head) is None and not head._forward_hooks and tuned.training
