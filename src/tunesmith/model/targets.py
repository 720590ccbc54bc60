"""Which parts of a model are tuned: found in the model itself, so that no table of architectures is needed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tunesmith.errors import ConfigError

_REGEX_SIGNS = frozenset("^$*+?[](){}|\\")


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module is a linear layer, plain, quantised, or of GPT-2's kind."""
    sized = hasattr(module, "in_features") and hasattr(module, "out_features")
    return isinstance(module, (torch.nn.Linear, Conv1D)) or (sized and not any(True for _ in module.children()))


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Module]]:
    """Every linear layer of the text model but the output head, with its full name."""
    head, decoder = model.get_output_embeddings(), _decoder(model)
    inside = {id(module) for module in decoder.modules()}
    for name, module in model.named_modules():
        if is_linear(module) and module is not head and id(module) in inside:
            yield name, module


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Weights that experts share one parameter for, ``[experts, out, in]``, as PEFT names them; none in a dense model."""
    inside = {id(parameter) for parameter in _decoder(model).parameters()}
    names = [name for name, parameter in model.named_parameters() if parameter.ndim == 3 and id(parameter) in inside]
    return sorted({".".join(name.split(".")[-3:]) for name in names if not name.endswith(".weight")})


def _decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part that reads text; the whole model where the library does not tell it."""
    try:
        found = model.get_decoder()
    except (AttributeError, NotImplementedError):
        found = None
    return found if isinstance(found, torch.nn.Module) else model


def resolve_targets(model: PreTrainedModel, asked: tuple[str, ...], key: str = "lora_target") -> list[str] | str:
    r"""What PEFT is to adapt.

    Args:
        model: not yet adapted.
        asked: ``all``; names of layers, as short (``q_proj``) or as long (``self_attn.q_proj``) as is unambiguous to the
            user; or one regular expression that full names match (``model\.layers\.[0-3]\..*_proj``).
        key: of the configuration, for messages.

    Returns:
        Names that PEFT matches at the end of full names, or the regular expression.

    Raises:
        ConfigError: a name or expression that fits no layer, with the nearest.
    """
    adaptable = [name for name, module in model.named_modules() if is_linear(module) or isinstance(module, torch.nn.Embedding)]
    if asked == ("all",):
        wanted = [name for name, _ in linear_layers(model)]
        short = sorted({name.rpartition(".")[2] for name in wanted})
        reached = [name for name in adaptable if name.rpartition(".")[2] in short]
        return short if set(reached) == set(wanted) else sorted(wanted)
    if len(asked) == 1 and _REGEX_SIGNS.intersection(asked[0]):
        return _expression(asked[0], adaptable, key)
    for name in asked:
        if not any(full == name or full.endswith(f".{name}") for full in adaptable):
            known = sorted({full.rpartition(".")[2] for full in adaptable})
            raise ConfigError(f"{key}: {name}: no such layer; {_nearest(name, known)}")
    return list(asked)


def _expression(expression: str, names: list[str], key: str) -> str:
    try:
        fits = any(re.fullmatch(expression, name) for name in names)
    except re.error as error:
        raise ConfigError(f"{key}: {expression!r} is no regular expression: {error}") from None
    if not fits:
        raise ConfigError(f"{key}: {expression!r} fits no layer; names are like {names[len(names) // 2]}")
    return expression


def check_modules(model: PreTrainedModel, asked: tuple[str, ...], key: str) -> list[str]:
    """The modules of these names. Raises ConfigError for one that the model does not have."""
    known = sorted({part for name, module in model.named_modules() if name and any(True for _ in module.parameters())
                    for part in (name, name.rpartition(".")[2]) if not part.isdigit()})  # fmt: skip
    for name in asked:
        if name not in known:
            raise ConfigError(f"{key}: {name}: no such module; {_nearest(name, [k for k in known if '.' not in k])}")
    return list(asked)


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"this model has {', '.join(known[:20])}"


# ---- whole layers


def trainable_in_layers(model: PreTrainedModel, count: int, modules: tuple[str, ...], extra: tuple[str, ...]) -> set[str]:
    """Names of the parameters that ``finetuning_type: freeze`` trains.

    Args:
        model: the base.
        count: above 0 the last so many layers, below 0 the first.
        modules: which modules of those layers, by a part of their name (``mlp``, ``self_attn``, ``q_proj``); ``all``.
        extra: further modules outside the layers (``embed_tokens``, ``norm``, ``lm_head``).

    Raises:
        ConfigError: more layers than there are, or a module that is not there.
    """
    prefix, layers = decoder_layers(model)
    total = len(layers)
    if not 0 < abs(count) <= total:
        raise ConfigError(f"num_layer_trainable: {count}: the model has {total} layers; give 1 to {total}, or -1 to -{total}")
    chosen = range(total - count, total) if count > 0 else range(-count)
    inside = {f"{prefix}.{i}.{name}" for i in chosen for name, _ in layers[i].named_parameters() if _picked(name, modules)}
    parts = sorted({part for name, _ in layers[0].named_parameters() for part in name.split(".")[:-1] if not part.isdigit()})
    for name in modules:
        if name not in ("all", *parts):
            raise ConfigError(f"name_module_trainable: {name}: no such module in a layer; {_nearest(name, parts)}")
    wanted = check_modules(model, extra, "freeze_extra_modules")
    owners = {id(p) for name, m in model.named_modules() if name in wanted or name.rpartition(".")[2] in wanted
              for p in m.parameters()}  # fmt: skip
    return inside | {name for name, parameter in model.named_parameters() if id(parameter) in owners}


def _picked(name: str, modules: tuple[str, ...]) -> bool:
    return "all" in modules or not set(modules).isdisjoint(name.split("."))


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """(name, modules) of the stack of layers. Raises ConfigError for a model without one."""
    wanted = model.config.get_text_config().num_hidden_layers
    inside = {id(module) for module in _decoder(model).modules()}
    stacks: Mapping[str, torch.nn.ModuleList] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted and id(module) in inside
    }
    if not stacks:
        raise ConfigError(f"finetuning_type: freeze: no stack of {wanted} layers is found in {type(model).__name__}; use lora")
    name = min(stacks, key=len)
    return name, stacks[name]
