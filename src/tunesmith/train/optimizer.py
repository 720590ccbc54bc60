"""Optimizers and schedules by the names that Transformers uses."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.optimization import Adafactor

from tunesmith.config.arguments import FinetuningArguments, TrainingArguments
from tunesmith.config.optimizers import OPTIMIZERS, missing_library, read_options
from tunesmith.errors import ConfigError
from tunesmith.train.optim.groups import Named, choose, hidden_matrices, learning_rates, parameter_groups
from tunesmith.train.optim.lion import Lion
from tunesmith.train.optim.lowrank import ApolloAdamW, GaLoreAdamW
from tunesmith.train.optim.muon import MuonWithAdamW


def build_optimizer(
    args: TrainingArguments, finetuning: FinetuningArguments, model: torch.nn.Module, parameters: Named
) -> torch.optim.Optimizer:
    """The optimizer that ``optim`` names.

    Args:
        args: ``optim``, ``optim_args``, ``optim_target_modules``, rates and decay.
        finetuning: rates of LoRA+.
        model: tells linear layers from embeddings.
        parameters: what is trained, by its name in the model.

    Raises:
        ConfigError: a setting does not suit the model, or a library is missing.
    """
    name, rate = args.optim, args.learning_rate
    options: dict[str, Any] = read_options(name, args.optim_args)
    rates = learning_rates(parameters, rate, finetuning)
    adam: dict[str, Any] = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}

    def groups(special: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return parameter_groups(parameters, args.weight_decay, rates, special)

    if name == "muon":
        matrices, others = groups(hidden_matrices(model))
        return MuonWithAdamW(matrices, others, rate, options, adam)
    if OPTIMIZERS[name].projects:
        targets = choose(hidden_matrices(model), args.optim_target_modules)
        projected, plain = groups(targets)
        rank = options.pop("rank")
        kind = GaLoreAdamW if name == "galore_adamw" else ApolloAdamW
        return kind([*({**group, "rank": rank} for group in projected), *plain], rate, **adam, **options)
    _, everything = groups()
    match name:
        case "adamw_torch" | "adamw_torch_fused":
            return torch.optim.AdamW(everything, lr=rate, fused=name == "adamw_torch_fused", **adam)
        case "sgd":
            return torch.optim.SGD(everything, lr=rate, **options)
        case "adagrad":
            return torch.optim.Adagrad(everything, lr=rate, **options)
        case "rmsprop":
            return torch.optim.RMSprop(everything, lr=rate, **options)
        case "adafactor":
            return Adafactor(everything, lr=rate, relative_step=False, **options)
        case "lion" | "lion_32bit":
            return Lion(everything, rate, adam["betas"])
    kept = {"betas": adam["betas"]} if "lion" in name else adam if OPTIMIZERS[name].heeds else {}
    return _from_library(name)(everything, lr=rate, **kept, **options)


_CLASSES = {
    "adamw_8bit": "AdamW8bit", "adamw_bnb_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW32bit",
    "paged_adamw_32bit": "PagedAdamW32bit", "paged_adamw_8bit": "PagedAdamW8bit", "lion_8bit": "Lion8bit",
    "paged_lion_32bit": "PagedLion32bit", "paged_lion_8bit": "PagedLion8bit", "rmsprop_bnb": "RMSprop32bit",
    "rmsprop_bnb_32bit": "RMSprop32bit", "rmsprop_bnb_8bit": "RMSprop8bit", "schedule_free_adamw": "AdamWScheduleFree",
    "schedule_free_radam": "RAdamScheduleFree", "schedule_free_sgd": "SGDScheduleFree",
}  # fmt: skip
"""Name -> class, in bitsandbytes.optim or schedulefree."""


def _from_library(name: str) -> Any:
    if reason := missing_library(name):
        raise ConfigError(f"optim: {reason}")
    library = OPTIMIZERS[name].library
    assert library is not None
    module = importlib.import_module("bitsandbytes.optim" if library == "bitsandbytes" else library)
    if OPTIMIZERS[name].paged and not torch.cuda.is_available():
        warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU", UserWarning)
    return getattr(module, _CLASSES[name])


def optimizer_notice(args: TrainingArguments, device: torch.device) -> str | None:
    """What a person should know of the optimizer on this device."""
    if OPTIMIZERS[args.optim].paged and device.type != "cuda":
        return f"{args.optim}: without a CUDA device the optimizer's state is not paged; the updates are the same"
    return None


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
