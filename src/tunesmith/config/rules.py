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
from tunesmith.config.optimizers import OPTIMIZERS, missing_library, read_options, unheeded
from tunesmith.config.policy import POLICY_STAGES, policy_violations
from tunesmith.config.preferences import PREFERENCE_LOSSES, REFERENCE_FREE_LOSSES, SMOOTHED_LOSSES
from tunesmith.config.reward import REWARD_KEYS

NO_EFFECT = {
    "neat_packing": "rows of a pack never see each other; packing: true is all it takes",
    "dataloader_num_workers": "batches are assembled from rows already tokenised; of a stream, a thread prepares the next ones",
    "dataloader_prefetch_factor": "one buffer of a stream is prepared while another is in use; stored rows need no preparing",
    "ddp_timeout": "data are prepared outside any collective call, so the default timeout holds",
    "ddp_find_unused_parameters": "only trainable parameters are tracked",
}
"""Keys of other toolkits that cannot change a result here: accepted with a notice that says why."""

ALIASES = {
    "flash_attn": "attn_implementation",
    "ppo_score_norm": "score_norm",
    "ppo_whiten_rewards": "whiten_rewards",
    "new_special_tokens": "add_special_tokens",
}
"""Keys of other toolkits that say the same as a key here."""

ALIAS_VALUES = {("flash_attn", "disabled"): "eager"}
"""(key, value) of another toolkit -> value here, where the two differ."""

REFUSED_VALUES = {
    ("flash_attn", value): f"{value} is not used here; attn_implementation: auto computes rows end to end without padding"
    for value in ("fa2", "fa3")
}
"""(key, value) of another toolkit -> what to use instead."""

UNSUPPORTED = {
    "adapter_name_or_path": "is called checkpoint_dir here",
    "create_new_adapter": "create_new_adapter: true is resume_lora_training: false here",
    "deepspeed": "runs use one process in this version",
    "do_eval": "to evaluate while training, set eval_strategy or eval_steps",
    "do_predict": "prediction over a data set is not supported in this version",
    "freeze_trainable_layers": "is called num_layer_trainable here",
    "freeze_trainable_modules": "is called name_module_trainable here",
    "finetuning_args": "the keys stand on their own, without nesting",
    "fsdp": "runs use one process in this version",
    "padding_side": "training batches have no padding; remove the key",
    "predict_with_generate": "generation during evaluation is not supported in this version",
    "reward_model_adapters": "name the adapter's folder as reward_model, with reward_model_type: lora",
    "run_name": "the run is named by output_dir",
    "save_only_model": "checkpoints can always be resumed from; remove the key",
    "stages": "a file with a list of stages is for `tunesmith pipeline`",
    "use_apollo": "set optim: apollo_adamw, its rank, scale and so on as optim_args",
    "use_galore": "set optim: galore_adamw, its rank, scale and so on as optim_args",
    "use_muon": "set optim: muon",
}
"""Keys of other toolkits that would change a result and cannot be honoured: refused, with what to do instead."""

FREE_ON_RESUME = frozenset({
    "output_dir", "overwrite_output_dir", "do_train", "num_train_epochs", "max_steps", "logging_steps", "eval_strategy",
    "eval_steps", "eval_on_start", "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint", "report_to", "sample_prompts",
    "sample_max_new_tokens", "bf16", "fp16", "data_seed", "gradient_checkpointing", "check_memory", "rollout_url",
})  # fmt: skip
"""Keys of training and of rollouts that a continued run may change; any other difference is refused. (Arithmetic and seed are
compared as they come out, not as they are spelt.)"""

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
    "num_iterations": "ppo_epochs",
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
    finetuning = sections.get("finetuning")
    if isinstance(model, ModelArguments):
        yield from _model_rules(model, training if isinstance(training, TrainingArguments) else None)
    if isinstance(data, DataArguments):
        yield from _data_rules(data)
        if isinstance(finetuning, FinetuningArguments):
            yield from _learning_rules(data, finetuning)
            yield from _stage_rules(data, finetuning, training if isinstance(training, TrainingArguments) else None)
    if isinstance(finetuning, FinetuningArguments):
        yield from _tuning_rules(finetuning)
        if isinstance(model, ModelArguments):
            yield from _quantisation_rules(model, finetuning)
            if finetuning.stage not in POLICY_STAGES:
                yield from without_reward(model, f"stage: {finetuning.stage}")
        yield from policy_violations(sections, finetuning)
    if isinstance(training, TrainingArguments):
        yield from _training_rules(training)
        yield from _optimizer_rules(training)
        if isinstance(finetuning, FinetuningArguments):
            yield from _projection_rules(training, finetuning)
        if isinstance(data, DataArguments):
            yield from _evaluation_rules(data, training)
            yield from _stream_rules(data, training)
            yield from _length_rules(data, training, finetuning)


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


def _quantisation_rules(model: ModelArguments, finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    if model.quantization_bit is None:
        for key in ("quantization_type", "double_quantization"):
            if key in model.model_fields_set and getattr(model, key) != _default(model, key):
                yield key, "has no meaning without quantization_bit: 4"
    else:
        if finetuning.finetuning_type in ("full", "freeze"):
            kind = finetuning.finetuning_type
            yield "quantization_bit", f"weights in few bits cannot be trained by finetuning_type: {kind}; use lora"
        if finetuning.pissa_init:
            yield "pissa_init", "changes the base's weights, which quantization_bit rounds; use one of the two"
    if not model.resume_lora_training and not model.checkpoint_dir:
        yield "resume_lora_training", "false has no meaning without checkpoint_dir"


def without_reward(model: ModelArguments, what: str) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for keys of a reward model that are set where nothing is scored."""
    for key in REWARD_KEYS:
        if getattr(model, key) != _default(model, key):
            yield (
                key,
                f"has no meaning with {what}, where nothing is scored; remove the key",
            )


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


_OF_TYPE = {
    "freeze": ("num_layer_trainable", "name_module_trainable", "freeze_extra_modules"),
    "lora": (
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "pissa_init",
        "pissa_iter",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
    ),
    "peft": ("peft_method", "peft_args"),
}
_OF_ADAPTERS = ("lora_target", "additional_target")


def _tuning_rules(finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    kind, given = finetuning.finetuning_type, finetuning.model_fields_set
    for other, keys in _OF_TYPE.items():
        for key in keys if other != kind else ():
            if key in given and getattr(finetuning, key) != _default(finetuning, key):
                yield key, f"has no meaning with finetuning_type: {kind}; it belongs to finetuning_type: {other}"
    for key in _OF_ADAPTERS if kind not in ("lora", "peft") else ():
        if key in given and getattr(finetuning, key) != _default(finetuning, key):
            yield key, f"has no meaning with finetuning_type: {kind}; it belongs to adapters"
    if kind == "peft" and finetuning.peft_method is None:
        yield "peft_method", "is needed with finetuning_type: peft; name a method of the PEFT library, e.g. oft"
    if finetuning.pissa_init and finetuning.use_dora:
        yield "pissa_init", "cannot start adapters of use_dora; keep one of the two"
    if kind == "lora" and finetuning.loraplus_lr_embedding is not None and finetuning.loraplus_lr_ratio is None:
        yield "loraplus_lr_embedding", "is part of LoRA+; set loraplus_lr_ratio (e.g. 16) as well, or remove the key"


def _default(section: Arguments, key: str) -> object:
    return type(section).model_fields[key].get_default(call_default_factory=True)


def _learning_rules(data: DataArguments, finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    asked = [key for key in ("mask_history", "train_on_prompt") if getattr(data, key)]
    if finetuning.stage != "sft":
        for key in asked:
            yield key, f"has no meaning with stage: {finetuning.stage}, only with stage: sft; remove the key"
    elif len(asked) > 1:
        yield "train_on_prompt", "learns all of a row, mask_history only its last assistant turn; keep one of the two"


_OF_STAGE = {
    "reward_centering": ("rm",),
    **dict.fromkeys(("pref_loss", "dpo_label_smoothing", "simpo_gamma", "discopop_tau", "ld_alpha"), ("dpo",)),
    **dict.fromkeys(("pref_beta", "pref_ftx"), ("dpo", "kto")),
    "ref_model": ("dpo", "kto", "ppo", "grpo"),
    "share_prompts": ("rm", "dpo", "ppo", "grpo"),
    **dict.fromkeys(("kto_loss", "kto_chosen_weight", "kto_rejected_weight"), ("kto",)),
}
"""Key -> stages that heed it."""


def _preference_rules(finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    weights = finetuning.pref_loss
    if unknown := [name for name in weights if name not in PREFERENCE_LOSSES]:
        yield "pref_loss", f"no loss named {', '.join(unknown)}; there are {', '.join(PREFERENCE_LOSSES)}"
        return
    if not any(weights.values()) or any(weight < 0 for weight in weights.values()):
        yield "pref_loss", "weights must not be negative, and one must be above 0"
    if "exo_pair" in weights and not finetuning.dpo_label_smoothing:
        yield "dpo_label_smoothing", "exo_pair needs a share above 0, e.g. 0.001"
    if finetuning.dpo_label_smoothing and not set(weights) & SMOOTHED_LOSSES:
        yield "dpo_label_smoothing", f"has no meaning with {', '.join(weights)}; remove the key"
    for key, name in (("simpo_gamma", "simpo"), ("discopop_tau", "discopop")):
        if getattr(finetuning, key) != _default(finetuning, key) and name not in weights:
            yield key, f"belongs to pref_loss: {name}; remove the key"
    for key in ("ref_model", "ld_alpha") if set(weights) <= REFERENCE_FREE_LOSSES else ():
        if getattr(finetuning, key) is not None:
            yield key, f"has no meaning with {', '.join(weights)}, which need no reference; remove the key"


def _stage_rules(
    data: DataArguments, finetuning: FinetuningArguments, training: TrainingArguments | None
) -> Iterator[tuple[str, str]]:
    stage = finetuning.stage
    for key, stages in _OF_STAGE.items():
        if stage not in stages and getattr(finetuning, key) != _default(finetuning, key):
            yield key, f"has no meaning with stage: {stage}, only with stage: {' or '.join(stages)}; remove the key"
    if stage == "dpo":
        yield from _preference_rules(finetuning)
    if stage == "kto" and finetuning.kto_chosen_weight == finetuning.kto_rejected_weight == "balanced":
        yield "kto_rejected_weight", "one class is balanced against the other; give one of the two weights as a number"
    if training is not None and (training.metric_for_best_model == "eval_reward") != (stage in POLICY_STAGES):
        other = "eval_reward" if stage in POLICY_STAGES else "eval_loss"
        yield "metric_for_best_model", f"is {other} in stage {stage}; remove the key"
    if stage not in ("rm", "dpo", "kto"):
        return
    if data.packing:
        yield (
            "packing",
            f"rows are not packed in stage {stage}, and nothing is padded all the same; remove the key",
        )
    if data.streaming:
        yield "streaming", f"stage {stage} reads prepared rows; remove the key"
    if stage == "rm" and training is not None and training.sample_prompts:
        yield "sample_prompts", "a reward model answers nothing; remove the key"


def _training_rules(training: TrainingArguments) -> Iterator[tuple[str, str]]:
    if training.max_steps == 0:
        yield "max_steps", "0 updates train nothing; give a positive number, or -1 to count by num_train_epochs"
    if training.eval_strategy == "epoch" and training.eval_steps is not None:
        yield "eval_steps", "has no meaning with eval_strategy: epoch; remove one of them"
    if training.resume_from_checkpoint and training.overwrite_output_dir:
        yield "overwrite_output_dir", "cannot start anew and resume at once; remove one of the two keys"
    if training.compile is True and training.use_liger_kernel is True:
        yield "use_liger_kernel", "compile: true replaces the same layers; set one of them to false"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "output_dir", "started by a launcher with several processes (WORLD_SIZE > 1); this version trains in one process"


def _optimizer_rules(training: TrainingArguments) -> Iterator[tuple[str, str]]:
    name, optimizer = training.optim, OPTIMIZERS[training.optim]
    if reason := missing_library(name):
        yield "optim", reason
    try:
        options = read_options(name, training.optim_args)
    except ValueError as error:
        yield "optim_args", str(error)
    else:
        if options.get("nesterov") and name == "sgd" and (not options["momentum"] or options["dampening"]):
            yield "optim_args", "nesterov needs momentum above 0 and dampening 0"
    for key in unheeded(name):
        if getattr(training, key) != _default(training, key):
            yield key, f"{name} does not use it; remove the key (its own options go into optim_args)"
    if training.optim_target_modules and not optimizer.projects:
        yield "optim_target_modules", f"{name} projects nothing; only galore_adamw and apollo_adamw take it"
    if optimizer.averages and training.lr_scheduler_type not in ("constant", "constant_with_warmup"):
        fix = "remove the key, or set constant or constant_with_warmup"
        yield "lr_scheduler_type", f"{name} averages the weights in place of a falling learning rate; {fix}"
    if training.lr_scheduler_type == "constant" and (training.warmup_steps or training.warmup_ratio):
        asked = "warmup_steps" if training.warmup_steps else "warmup_ratio"
        yield asked, "lr_scheduler_type: constant does not warm up; set constant_with_warmup, or remove the key"


def _projection_rules(training: TrainingArguments, finetuning: FinetuningArguments) -> Iterator[tuple[str, str]]:
    if OPTIMIZERS[training.optim].projects and finetuning.finetuning_type not in ("full", "freeze"):
        reason = f"{training.optim} projects the gradients of whole matrices, those of adapters are small already"
        yield "optim", f"{reason}; set finetuning_type: full, or another optimizer"


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


def _stream_rules(data: DataArguments, training: TrainingArguments) -> Iterator[tuple[str, str]]:
    default = DataArguments.model_fields["buffer_size"].default
    if not data.streaming:
        if data.buffer_size != default:
            yield "buffer_size", "has a meaning with streaming: true only; remove it"
        return
    if training.max_steps < 0:
        yield "streaming", "needs max_steps: N, because how many rows there are is not known before the end of the stream"
    for key, value in (("val_size", data.val_size), ("dev_ratio", data.dev_ratio)):
        if 0 < value < 1:
            yield key, "a share of a stream is not known before its end; set val_size: N (its first N rows), or eval_dataset"
    if data.disable_shuffling and not data.packing and data.buffer_size != default:
        yield "buffer_size", "nothing is shuffled or packed in a buffer; remove it, or disable_shuffling"
    if not data.eval_dataset:
        stored = {"overwrite_cache": data.overwrite_cache, "tokenized_path": data.tokenized_path,
                  "preprocessing_num_workers": data.preprocessing_num_workers}  # fmt: skip
        for key in (key for key, value in stored.items() if value):
            yield key, "is about stored rows, and with streaming: true only those of eval_dataset are stored; remove it"


def _length_rules(data: DataArguments, training: TrainingArguments, finetuning: Arguments | None) -> Iterator[tuple[str, str]]:
    if not training.group_by_length:
        return
    why = {
        "streaming: the lengths of rows to come are not known": data.streaming,
        "packing: packs are of one length already": data.packing,
        "disable_shuffling: rows cannot both keep their order and be sorted": data.disable_shuffling,
        "stage pt: blocks are of one length already": isinstance(finetuning, FinetuningArguments) and finetuning.stage == "pt",
    }
    for reason in (reason for reason, given in why.items() if given):
        yield "group_by_length", f"does not go with {reason}; remove one of the two"
