"""Optimizers and schedules by the names that Transformers uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import Adafactor

from tunesmith.config.arguments import TrainingArguments
from tunesmith.errors import ConfigError


def parameter_groups(parameters: Mapping[str, torch.nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, which decay, and biases and norms (at most one dimension), which do not."""
    decayed = [p for p in parameters.values() if p.ndim > 1]
    spared = [p for p in parameters.values() if p.ndim <= 1]
    groups: list[dict[str, object]] = [{"params": decayed, "weight_decay": weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return groups


def build_optimizer(args: TrainingArguments, parameters: Mapping[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``optim`` names, over ``parameters``."""
    groups = parameter_groups(parameters, args.weight_decay)
    rate = args.learning_rate
    betas = (args.adam_beta1, args.adam_beta2)
    match args.optim:
        case "adamw_torch" | "adamw_torch_fused":
            fused = args.optim == "adamw_torch_fused"
            return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=args.adam_epsilon, fused=fused)
        case "sgd":
            return torch.optim.SGD(groups, lr=rate)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=rate)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=rate)
        case "adafactor":
            return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)


def build_schedule(args: TrainingArguments, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """The learning-rate schedule that ``lr_scheduler_type`` names, over ``total_steps`` updates.

    Raises:
        ConfigError: ``lr_scheduler_kwargs`` does not suit the schedule.
    """
    warmup = args.warmup_steps or round(args.warmup_ratio * total_steps)
    kwargs = dict(args.lr_scheduler_kwargs)
    if args.lr_scheduler_type == "warmup_stable_decay":
        kwargs.setdefault("num_decay_steps", max(total_steps // 10, 1))
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=kwargs,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler_kwargs: {args.lr_scheduler_type} does not take {kwargs}: {error}") from None
