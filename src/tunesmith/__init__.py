"""tunesmith fine-tunes large language models."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Batch": "tunesmith.types",
    "ChatTemplate": "tunesmith.data.template",
    "Conversation": "tunesmith.types",
    "DataArguments": "tunesmith.config.arguments",
    "DataTrainingArguments": "tunesmith.config.arguments",
    "DataReport": "tunesmith.data.report",
    "DatasetAttr": "tunesmith.config.arguments",
    "DynamicDataCollatorWithPadding": "tunesmith.data.padding",
    "Example": "tunesmith.types",
    "FinetuningArguments": "tunesmith.config.arguments",
    "GeneratingArguments": "tunesmith.config.arguments",
    "IGNORE_INDEX": "tunesmith.types",
    "InvalidScoreLogitsProcessor": "tunesmith.generate.logits",
    "LossOutput": "tunesmith.types",
    "Message": "tunesmith.types",
    "ModelArguments": "tunesmith.config.arguments",
    "NamedTemplate": "tunesmith.data.named",
    "PairwiseDataCollatorWithPadding": "tunesmith.data.padding",
    "PairwisePeftTrainer": "tunesmith.stages.rm",
    "PeftTrainer": "tunesmith.train.trainer",
    "PretrainPeftTrainer": "tunesmith.stages.pretrain",
    "Seq2SeqPeftTrainer": "tunesmith.stages.sft",
    "Source": "tunesmith.types",
    "TrainingArguments": "tunesmith.config.arguments",
    "TunesmithError": "tunesmith.errors",
    "get_logits_processor": "tunesmith.generate.logits",
    "get_template": "tunesmith.data.named",
    "init_adapter": "tunesmith.model.tuning",
    "load_examples": "tunesmith.data.prepare",
    "load_trainable_params": "tunesmith.model.adapter",
    "load_config": "tunesmith.config.load",
    "load_pretrained": "tunesmith.model.load",
    "load_reward_model": "tunesmith.model.reward",
    "plot_loss": "tunesmith.report.plot",
    "prepare_data": "tunesmith.data.prepare",
    "preprocess_data": "tunesmith.data.preprocess",
    "print_dataset_example": "tunesmith.check.example",
    "run": "tunesmith.stages.run",
    "smooth": "tunesmith.report.plot",
    "template_names": "tunesmith.data.named",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
