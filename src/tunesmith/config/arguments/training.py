"""How long, how fast, where to."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.config.arguments.base import Arguments, NameList
from tunesmith.config.optimizers import OPTIMIZERS, OptimizerName


def _split_options(value: Any) -> Any:
    """``"rank=128, scale=0.25"``, as Transformers writes it, -> a mapping of texts."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not (key.strip() and equals and text.strip()) for key, equals, text in pairs):
        raise ValueError("expected a mapping, or key=value pairs with commas between them")
    return {key.strip(): text.strip() for key, _, text in pairs}


def _bare_no(value: Any) -> Any:
    return "no" if value is False else value


When = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_bare_no)]
"""When to do something. YAML reads a bare ``no`` as false; both are understood."""


class TrainingArguments(Arguments):
    """How long, how fast, where to."""

    output_dir: str = Field(min_length=1, description="The run folder.")
    overwrite_output_dir: bool = Field(
        False, description="Start anew in a used run folder; removes only files that a run made."
    )
    do_train: Literal[True] = Field(True, description="Present for the ecosystem's YAML files; training is what train does.")
    per_device_train_batch_size: int = Field(4, gt=0, description="Rows in one forward pass.")
    per_device_eval_batch_size: int = Field(
        8, gt=0, description="Rows in one evaluation forward pass; stages ppo and grpo answer as many as fit."
    )
    gradient_accumulation_steps: int = Field(1, gt=0, description="Forward passes summed into one update.")
    num_train_epochs: float = Field(3.0, gt=0, description="Passes over the data.")
    group_by_length: bool = Field(
        False, description="Batches of rows of similar length, the longest first: fewer pads where a model needs them."
    )
    max_steps: int = Field(-1, ge=-1, description="Number of updates; -1: from num_train_epochs.")
    learning_rate: float = Field(5e-5, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay",
    ] = Field("linear", description="Schedule, by Transformers' name; constant where unset with schedule_free_*.")  # fmt: skip
    lr_scheduler_kwargs: dict[str, float | int | str] = Field(
        default_factory=dict, description="Further arguments of the schedule, e.g. {min_lr: 1e-6}."
    )
    warmup_steps: int = Field(0, ge=0, description="Updates over which the learning rate rises.")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="The same as a share of all updates; warmup_steps wins.")
    optim: OptimizerName = Field("adamw_torch", description="Optimizer, by Transformers' name (the guide has a table).")
    optim_args: Annotated[dict[str, bool | int | float | str], BeforeValidator(_split_options)] = Field(
        default_factory=dict, description="Options of the optimizer, as a mapping or as rank=128,scale=0.25."
    )
    optim_target_modules: NameList = Field(
        (),
        description="Linear layers whose gradients galore_adamw and apollo_adamw project: names, or parts of them between "
        "dots; every one but the output head if unset (or all-linear).",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decay of matrices; biases and norms are spared.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Adam's first moment.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Adam's second moment.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Adam's epsilon.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient to this L2 norm; 0: never.")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="NEFTune: uniform noise on embeddings in training, at most alpha / sqrt(row length x width)."
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        "auto",
        description="Recompute activations in the backward pass: less memory, slower. auto: only if it would not fit else.",
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="Compile what layers do between matrix products and attention (needs a C++ compiler, or Triton on a GPU). "
        "auto: on a CPU, if the run is long enough to win it back.",
    )
    use_liger_kernel: bool | Literal["auto"] = Field(
        "auto",
        description="Norms and gated layers by Liger's kernels. auto: on an NVIDIA GPU, if liger-kernel is installed.",
    )
    check_memory: bool = Field(True, description="Refuse to begin a run that is planned to need more memory than there is.")
    bf16: bool = Field(False, description="Same as compute_dtype: bf16.")
    fp16: bool = Field(False, description="Same as compute_dtype: fp16 (with loss scaling).")
    seed: int = Field(42, ge=0, lt=2**32, description="Seed of initialisation, dropout and, unless data_seed is set, order.")
    data_seed: int | None = Field(None, ge=0, lt=2**32, description="Seed of the split and of the order of rows.")
    logging_steps: int = Field(1, gt=0, description="Updates between two lines of trainer_log.jsonl.")
    eval_strategy: When = Field("no", description="When to evaluate.")
    eval_steps: int | None = Field(
        None, gt=0, description="Updates between evaluations; save_steps if unset. Setting it implies eval_strategy: steps."
    )
    eval_on_start: bool = Field(False, description="Evaluate once before the first update.")
    save_strategy: When = Field("steps", description="When to write a checkpoint.")
    save_steps: int = Field(500, gt=0, description="Updates between checkpoints.")
    save_total_limit: int | None = Field(None, gt=0, description="Keep that many checkpoints; the best and the last stay.")
    load_best_model_at_end: bool = Field(False, description="Finish with the weights of the best evaluation.")
    metric_for_best_model: Literal["eval_loss", "eval_reward"] = Field(
        "eval_loss", description="What best means: the lowest evaluation loss; in stages ppo and grpo the highest reward."
    )
    resume_from_checkpoint: str | bool | None = Field(
        None, description="auto (or true): the newest sound checkpoint of output_dir; or a checkpoint folder."
    )
    report_to: Literal["none"] = Field("none", description="Experiment tracker; trainer_log.jsonl is always written.")
    sample_prompts: tuple[str, ...] = Field((), description="Questions answered greedily before and after training.")
    sample_max_new_tokens: int = Field(80, gt=0, description="Longest of those answers, in tokens.")

    @model_validator(mode="before")
    @classmethod
    def _no_schedule_where_weights_are_averaged(cls, values: Any) -> Any:
        if isinstance(values, dict) and "lr_scheduler_type" not in values:
            optimizer = OPTIMIZERS.get(str(values.get("optim")))
            if optimizer and optimizer.averages:
                warms_up = values.get("warmup_steps") or values.get("warmup_ratio")
                return {**values, "lr_scheduler_type": "constant_with_warmup" if warms_up else "constant"}
        return values
