"""Models that give the same in training as in use."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


def without_dropout(model: PreTrainedModel) -> int:
    """Switch dropout off for good, wherever layers hold it: as modules, or as a number that they hand to attention.

    Returns:
        How many places had some.
    """
    count = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.p, count = 0.0, count + 1
        for name in ("attention_dropout", "dropout"):
            value = module.__dict__.get(name)
            if isinstance(value, float) and value:
                setattr(module, name, 0.0)
                count += 1
    return count
