"""The argument classes: one frozen pydantic model per concern, keys named as Transformers and LLaMA-Factory name them.

A field's documentation is its description; ``tunesmith config`` prints it. Rules that join several fields live in
``config/rules.py``.
"""

from __future__ import annotations

from typing import Any

from tunesmith.config.arguments.base import Arguments
from tunesmith.config.arguments.data import DataArguments, DatasetAttr, DataTrainingArguments
from tunesmith.config.arguments.finetuning import FinetuningArguments
from tunesmith.config.arguments.generating import GeneratingArguments
from tunesmith.config.arguments.model import ModelArguments
from tunesmith.config.arguments.policy import PolicyArguments
from tunesmith.config.arguments.training import TrainingArguments

__all__ = [
    "SECTIONS",
    "Arguments",
    "DataArguments",
    "DataTrainingArguments",
    "DatasetAttr",
    "FinetuningArguments",
    "GeneratingArguments",
    "ModelArguments",
    "PolicyArguments",
    "RunConfig",
    "TrainingArguments",
]


class RunConfig(Arguments):
    """All sections of one run."""

    model: ModelArguments
    data: DataArguments
    finetuning: FinetuningArguments
    policy: PolicyArguments
    training: TrainingArguments
    generating: GeneratingArguments

    @property
    def compute_dtype(self) -> str:
        """``auto``, ``bf16``, ``fp16`` or ``fp32``, whichever of the three keys said it."""
        if self.training.bf16:
            return "bf16"
        return "fp16" if self.training.fp16 else self.model.compute_dtype

    def to_flat(self) -> dict[str, Any]:
        """Every key of every section in one flat mapping of plain values, as a YAML file holds them."""
        flat: dict[str, Any] = {}
        for name in type(self).model_fields:
            flat.update(getattr(self, name).model_dump(mode="json"))
        return flat


SECTIONS: dict[str, type[Arguments]] = {
    "model": ModelArguments,
    "data": DataArguments,
    "finetuning": FinetuningArguments,
    "policy": PolicyArguments,
    "training": TrainingArguments,
    "generating": GeneratingArguments,
}
"""Section name -> class, in the order in which ``tunesmith config`` prints them."""
