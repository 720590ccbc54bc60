"""Parameter groups: what decays, which rate each parameter learns at, which matrices are treated as matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from tunesmith.config.arguments import FinetuningArguments
from tunesmith.errors import ConfigError

Named = Mapping[str, torch.nn.Parameter]
_EMBEDDING_RATE = 1e-6
"""LoRA+ rate of adapters of an embedding, as in PEFT."""


def parameter_groups(
    parameters: Named,
    weight_decay: float,
    rate: Callable[[str], float],
    special: Iterable[str] = (),
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(groups of the special parameters, groups of the others), each by decay and rate, in order of first appearance.

    Matrices decay; biases and norms (at most one dimension) do not.

    Args:
        parameters: name -> parameter.
        weight_decay: decay of matrices.
        rate: learning rate of a parameter, by its name.
        special: names of parameters that form groups of their own.
    """
    chosen = frozenset(special)
    groups: dict[tuple[bool, bool, float], dict[str, Any]] = {}
    for name, p in sorted(parameters.items(), key=lambda item: item[1].ndim <= 1):
        decay = weight_decay if p.ndim > 1 else 0.0
        key = (name in chosen, p.ndim > 1, rate(name))
        groups.setdefault(key, {"params": [], "weight_decay": decay, "lr": key[2]})["params"].append(p)
    return (
        [group for key, group in groups.items() if key[0]],
        [group for key, group in groups.items() if not key[0]],
    )


def learning_rates(parameters: Named, base: float, args: FinetuningArguments) -> Callable[[str], float]:
    """The rate of each parameter by name: ``base``, or as LoRA+ (arXiv 2402.12354) has it.

    Raises:
        ConfigError: a rate is asked for of adapters that the model does not have.
    """
    ratio = args.loraplus_lr_ratio
    if ratio is None:
        return lambda name: base
    if not any(".lora_B." in name for name in parameters):
        raise ConfigError("loraplus_lr_ratio: the model has no trainable lora_B matrices; remove the key")
    if args.loraplus_lr_embedding is not None and not any("lora_embedding_" in name for name in parameters):
        raise ConfigError("loraplus_lr_embedding: no embedding has an adapter; remove the key, or adapt the embedding")
    embedding = args.loraplus_lr_embedding if args.loraplus_lr_embedding is not None else _EMBEDDING_RATE

    def rate(name: str) -> float:
        if "lora_embedding_" in name:
            return embedding
        return base * ratio if ".lora_B." in name else base

    return rate


def hidden_matrices(model: torch.nn.Module) -> list[str]:
    """Names of the trainable weights of linear layers, those of adapters included, without the output head's."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    shut_out = {id(module.weight) for module in (head, embedding) if module is not None}
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad and id(module.weight) not in shut_out
    ]


def choose(matrices: list[str], asked: tuple[str, ...]) -> list[str]:
    """Those of ``matrices`` that ``optim_target_modules`` means: all, or those with an asked part between dots.

    Raises:
        ConfigError: a name fits no linear layer.
    """
    if asked in ((), ("all",), ("all-linear",)):
        return matrices
    for part in asked:
        if not any(_has(name, part) for name in matrices):
            last = sorted({name.split(".")[-2] for name in matrices})
            raise ConfigError(f"optim_target_modules: {part}: no such linear layer; this model has {', '.join(last)}")
    return [name for name in matrices if any(_has(name, part) for part in asked)]


def _has(name: str, part: str) -> bool:
    return f".{part}." in f".{name}"
