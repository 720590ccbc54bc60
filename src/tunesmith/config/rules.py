"""Rules that join several fields, and what is said about keys that other toolkits know."""

from __future__ import annotations

import os
from collections.abc import Iterator

from tunesmith.config.arguments import (
    Arguments,
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    TrainingArguments,
)

NO_EFFECT = {
    "neat_packing": "rows of a pack never see each other; packing: true is all it takes",
    "dataloader_num_workers": "batches are assembled from rows already tokenised; no worker is needed",
    "ddp_timeout": "data are prepared outside any collective call, so the default timeout holds",
    "ddp_find_unused_parameters": "only trainable parameters are tracked",
}
"""Keys of other toolkits that cannot change a result here: accepted with a notice that says why."""

ALIASES = {
    "flash_attn": "attn_implementation",
    "new_special_tokens": "add_special_tokens",
}
"""Keys of other toolkits that say the same as a key here."""

ALIAS_VALUES = {("flash_attn", "disabled"): "eager"}
"""(key, value) of another toolkit -> value here, where the two differ."""

REFUSED_VALUES = {
    ("flash_attn", value): f"{value} is not used here; flash_attn: auto computes rows end to end without padding, with torch's "
    "own kernels"
    for value in ("fa2", "fa3")
}
"""(key, value) of another toolkit -> what to use instead."""

UNSUPPORTED = {
    "adapter_name_or_path": "continuing from an adapter is not supported in this version",
    "additional_target": "training further modules beside the adapters is not supported in this version",
    "checkpoint_dir": "continuing from an adapter is not supported in this version",
    "create_new_adapter": "continuing from an adapter is not supported in this version",
    "deepspeed": "runs use one process in this version",
    "do_eval": "to evaluate while training, set eval_strategy or eval_steps",
    "do_predict": "prediction over a data set is not supported in this version",
    "finetuning_args": "the keys stand on their own, without nesting",
    "freeze_trainable_layers": "finetuning_type: freeze is not supported in this version",
    "freeze_trainable_modules": "finetuning_type: freeze is not supported in this version",
    "fsdp": "runs use one process in this version",
    "name_module_trainable": "finetuning_type: freeze is not supported in this version",
    "num_layer_trainable": "finetuning_type: freeze is not supported in this version",
    "padding_side": "training batches have no padding; remove the key",
    "predict_with_generate": "generation during evaluation is not supported in this version",
    "quantization_bit": "quantised bases are not supported in this version",
    "quantization_type": "quantised bases are not supported in this version",
    "double_quantization": "quantised bases are not supported in this version",
    "resume_lora_training": "continuing from an adapter is not supported in this version",
    "reward_model": "stage ppo is not supported in this version",
    "run_name": "the run is named by output_dir",
    "save_only_model": "checkpoints can always be resumed from; remove the key",
    "streaming": "data sets are read whole in this version",
}
"""Keys of other toolkits that would change a result and cannot be honoured: refused, with what to do instead."""

FREE_ON_RESUME = frozenset({
    "output_dir", "overwrite_output_dir", "do_train", "num_train_epochs", "max_steps", "logging_steps", "eval_strategy",
    "eval_steps", "eval_on_start", "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "report_to", "sample_prompts",
    "sample_max_new_tokens", "bf16", "fp16", "data_seed", "gradient_checkpointing",
})  # fmt: skip
"""Training keys that a continued run may change; any other difference is refused. (Arithmetic and seed are compared as
they come out, not as they are spelt.)"""

ONE_SHOT = frozenset({"overwrite_output_dir", "resume_from_checkpoint"})
"""Keys that say how this start begins; not kept in the run's config.yaml."""

NICKNAMES = {
    "batch_size": "per_device_train_batch_size",
    "batch": "per_device_train_batch_size",
    "disable_gradient_checkpointing": "gradient_checkpointing",
    "epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "grad_accum": "gradient_accumulation_steps",
    "gradient_accumulation": "gradient_accumulation_steps",
    "lora_r": "lora_rank",
    "lr": "learning_rate",
    "max_seq_length": "cutoff_len",
    "max_seq_len": "cutoff_len",
    "model": "model_name_or_path",
    "num_epochs": "num_train_epochs",
    "r": "lora_rank",
    "resume": "resume_from_checkpoint",
    "steps": "max_steps",
    "train_file": "dataset",
}
"""Names that people type for keys spelt differently here; used only for hints."""


def violations(sections: dict[str, Arguments]) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for every joint rule that the sections break. Sections that did not parse are absent."""
    model = sections.get("model")
    data = sections.get("data")
    training = sections.get("training")
    if isinstance(model, ModelArguments):
        yield from _model_rules(model, training if isinstance(training, TrainingArguments) else None)
    if isinstance(data, DataArguments):
        yield from _data_rules(data)
        if isinstance(finetuning := sections.get("finetuning"), FinetuningArguments):
            yield from _learning_rules(data, finetuning)
    if isinstance(training, TrainingArguments):
        yield from _training_rules(training)
        if isinstance(data, DataArguments):
            yield from _evaluation_rules(data, training)


def _model_rules(model: ModelArguments, training: TrainingArguments | None) -> Iterator[tuple[str, str]]:
    if not model.use_fast_tokenizer:
        yield "use_fast_tokenizer", "must be true: loss masks are mapped to tokens by the fast tokenizer's offsets"
    if training is None:
        return
    if training.bf16 and training.fp16:
        yield "fp16", "bf16 and fp16 cannot both be true; keep one"
    for name, asked in (("bf16", training.bf16), ("fp16", training.fp16)):
        if asked and model.compute_dtype not in ("auto", name):
            yield name, f"{name}: true contradicts compute_dtype: {model.compute_dtype}; keep one"


def _data_rules(data: DataArguments) -> Iterator[tuple[str, str]]:
    if not data.dataset:
        yield "dataset", "no data set given; name one or more from dataset_info.json"
    if data.interleave_probs and data.mix_strategy == "concat":
        yield "interleave_probs", "has no meaning with mix_strategy: concat; set interleave_under or interleave_over"
    elif data.interleave_probs and len(data.interleave_probs) != len(data.dataset):
        yield "interleave_probs", f"{len(data.interleave_probs)} shares for {len(data.dataset)} data sets; give one per set"
    if any(share <= 0 for share in data.interleave_probs):
        yield "interleave_probs", "every share must be above 0"
    if data.val_size and data.dev_ratio:
        yield "dev_ratio", "val_size and dev_ratio say the same thing; keep one"
    if data.eval_dataset and (data.val_size or data.dev_ratio):
        yield "eval_dataset", "give either eval_dataset or a held-out share (val_size, dev_ratio), not both"
    if data.val_size > 1 and data.val_size != int(data.val_size):
        yield "val_size", f"below 1 it is a share, from 1 a whole number of rows; found {data.val_size}"
    prefixes = data.source_prefix.split("|")
    if len(prefixes) > 1 and data.eval_dataset:
        yield "source_prefix", "one prefix per set does not say which one eval_dataset takes; give one prefix for all"
    if len(prefixes) not in (1, len(data.dataset)):
        yield "source_prefix", f"{len(prefixes)} prefixes for {len(data.dataset)} data sets; give one, or one per set"


def _learning_rules(data: DataArguments, finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    asked = [key for key in ("mask_history", "train_on_prompt") if getattr(data, key)]
    if finetuning.stage != "sft":
        for key in asked:
            yield key, f"has no meaning with stage: {finetuning.stage}, only with stage: sft; remove the key"
    elif len(asked) > 1:
        yield "train_on_prompt", "learns all of a row, mask_history only its last assistant turn; keep one of the two"


def _training_rules(training: TrainingArguments) -> Iterator[tuple[str, str]]:
    if training.max_steps == 0:
        yield "max_steps", "0 updates train nothing; give a positive number, or -1 to count by num_train_epochs"
    if training.eval_strategy == "epoch" and training.eval_steps is not None:
        yield "eval_steps", "has no meaning with eval_strategy: epoch; remove one of them"
    if training.resume_from_checkpoint and training.overwrite_output_dir:
        yield "overwrite_output_dir", "cannot start anew and resume at once; remove one of the two keys"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "output_dir", "started by a launcher with several processes (WORLD_SIZE > 1); this version trains in one process"


def evaluates(training: TrainingArguments) -> bool:
    """Whether the run evaluates while it trains."""
    return training.eval_strategy != "no" or training.eval_steps is not None


def _evaluation_rules(data: DataArguments, training: TrainingArguments) -> Iterator[tuple[str, str]]:
    has_rows = bool(data.eval_dataset or data.val_size or data.dev_ratio)
    if evaluates(training) and not has_rows:
        key = "eval_steps" if training.eval_steps is not None else "eval_strategy"
        yield key, "nothing to evaluate on; set val_size (e.g. 0.05) or eval_dataset"
    if has_rows and not evaluates(training):
        key = next(name for name in ("eval_dataset", "val_size", "dev_ratio") if getattr(data, name))
        yield key, "rows are held out but never used; set eval_strategy: epoch, or eval_steps: N"
    if training.load_best_model_at_end and not evaluates(training):
        yield "load_best_model_at_end", "needs evaluation; set eval_strategy or eval_steps"
