"""What is trained, and by which method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from tunesmith.config.arguments.base import Arguments, NameList, weighted

ClassWeight = Annotated[float, Field(gt=0)] | Literal["balanced"]
"""Weight of one of two classes, or what makes both count alike."""


class FinetuningArguments(Arguments):
    """What is trained."""

    stage: Literal["pt", "sft", "rm", "dpo", "kto", "ppo", "grpo"] = Field(
        "sft",
        description="Training stage. pt: pretraining on plain text. sft: supervised fine-tuning on dialogues. rm: reward model "
        "on preference pairs. dpo: preference pairs learned directly (see pref_loss). kto: single answers found good or bad. "
        "ppo, grpo: the model answers prompts, and learns from what its answers are worth.",
    )
    pref_loss: Annotated[dict[str, float], BeforeValidator(weighted)] = Field(
        {"sigmoid": 1.0},
        description="dpo: loss, or several with their weights (sigmoid: 1, sft: 0.2). Names: see the guide.",
    )
    pref_beta: float = Field(0.1, gt=0, description="dpo, kto: strength of the loss; how far from the reference.")
    pref_ftx: float = Field(
        0.0, ge=0, description="dpo, kto: weight of the chosen (good) answer's own loss (-log p, its tokens' mean)."
    )
    dpo_label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="dpo: share of pairs that are labelled wrongly.")
    simpo_gamma: float = Field(0.5, ge=0, description="dpo: margin of pref_loss: simpo.")
    discopop_tau: float = Field(0.05, gt=0, description="dpo: temperature of pref_loss: discopop.")
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="dpo: weight of the tokens by which one answer is longer than the other (LD-DPO)."
    )
    ref_model: str | None = Field(
        None, description="dpo, kto, ppo, grpo: reference model (folder, hub id or run); the model as training begins if unset."
    )
    share_prompts: bool = Field(
        True, description="rm, dpo, ppo, grpo: compute once what answers to one prompt begin with, instead of once for each."
    )
    kto_loss: Literal["kto", "apo_zero_unpaired"] = Field(
        "kto",
        description="kto: measured from how far the model has gone on answers to other prompts (arXiv 2402.01306). "
        "apo_zero_unpaired: measured from 0 (arXiv 2408.06266).",
    )
    kto_chosen_weight: ClassWeight = Field(
        1.0, description="kto: weight of good answers. balanced: all of them together count as much as all bad ones."
    )
    kto_rejected_weight: ClassWeight = Field(1.0, description="kto: weight of bad answers, or balanced.")
    reward_centering: float = Field(
        0.0, ge=0, description="rm: factor of (r_chosen + r_rejected)^2, which keeps rewards around 0 (0.01 is usual)."
    )
    finetuning_type: Literal["lora", "freeze", "full", "peft", "none"] = Field(
        "lora",
        description="lora: low-rank adapters. freeze: some layers (num_layer_trainable). full: all weights. peft: what "
        "peft_method names. none: nothing, for use without training.",
    )
    num_layer_trainable: int = Field(2, description="freeze: train the last n layers, or with a negative number the first n.")
    name_module_trainable: NameList = Field(
        ("all",), description="freeze: which modules of those layers, e.g. mlp or self_attn; all: whole layers."
    )
    freeze_extra_modules: NameList = Field(
        (), description="freeze: further modules outside the layers, e.g. embed_tokens, norm, lm_head."
    )
    peft_method: str | None = Field(None, description="peft: a method of the PEFT library by name, e.g. oft, ia3, vera, loha.")
    peft_args: dict[str, Any] = Field(default_factory=dict, description="peft: its options, e.g. {r: 8}.")
    lora_rank: int = Field(8, gt=0, description="Rank of the adapters.")
    lora_alpha: float | None = Field(None, gt=0, description="Scale of the adapters; twice the rank if unset.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    lora_target: NameList = Field(
        ("all",),
        description="Layers to adapt, by name (q_proj), or one regular expression for full names; all: every linear layer of "
        "the text model, experts among them, but the output head.",
    )
    additional_target: NameList = Field(
        (), description="Modules trained whole beside the adapters and saved with them, e.g. embed_tokens, lm_head."
    )
    pissa_init: bool = Field(
        False, description="Start the adapters from the principal singular vectors (arXiv 2404.02948); saved as plain LoRA."
    )
    pissa_iter: int = Field(16, ge=-1, description="Iterations of the fast decomposition of pissa_init; -1: the exact one.")
    use_rslora: bool = Field(False, description="Rank-stabilised scale, alpha / sqrt(rank) (arXiv 2312.03732).")
    use_dora: bool = Field(False, description="Weight-decomposed adapters (arXiv 2402.09353).")
    loraplus_lr_ratio: float | None = Field(
        None, gt=0, description="LoRA+: B matrices learn at that many times learning_rate (arXiv 2402.12354)."
    )
    loraplus_lr_embedding: float | None = Field(
        None, gt=0, description="LoRA+: learning rate of adapters of an embedding; 1e-6 if unset."
    )
