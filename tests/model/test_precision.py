"""Norms in fp32 change their rounding and nothing else's dtype."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tunesmith.config.arguments import ModelArguments
from tunesmith.model.precision import norms_to_float


def test_norms_are_held_in_fp32(tiny_model: Path) -> None:
    ids = torch.arange(20)[None]
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    before = model(ids).logits
    names = ModelArguments(model_name_or_path="m").layer_norm_names
    assert norms_to_float(model, names) == 5
    assert norms_to_float(model, names) == 0
    norms = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert norms == {name for name, _ in model.named_parameters() if "norm" in name}
    after = model(ids).logits
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after, before, atol=2e-2, rtol=2e-2)
    assert norms_to_float(model, ["nothing"]) == 0
