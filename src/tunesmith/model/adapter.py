"""What is trained: adapters in PEFT's format, or weights of the model, and a value head. Saving and loading of just that."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder
from tunesmith.model.heads import ValueHead, head_parameters, load_value_head, save_value_head
from tunesmith.model.origin import write_origin

TRAINABLE_WEIGHTS = "trainable.safetensors"
GENERATION_CONFIG = "generation_config.json"


Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (down ``[r, in]``, up ``[out, r]``): the layer's weight is changed by ``up @ down``."""


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapted one."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def set_head(model: torch.nn.Module, head: ValueHead) -> None:
    """Put a value head on the model: it is trained, saved and loaded with it, in a file of its own."""
    model.__dict__["_tunesmith_head"] = head


def drop_head(model: torch.nn.Module) -> None:
    """Take the value head off again."""
    model.__dict__.pop("_tunesmith_head", None)


def head_of(model: torch.nn.Module) -> ValueHead | None:
    """What ``set_head`` was given."""
    found: ValueHead | None = model.__dict__.get("_tunesmith_head")
    return found


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter for all that receive gradients, those of a value head last."""
    head = head_of(model)
    on_top = head_parameters(head) if head is not None else {}
    return {**_own_trainable(model), **{name: p for name, p in on_top.items() if p.requires_grad}}


def _own_trainable(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def recompute_activations(model: torch.nn.Module) -> None:
    """Have the layers keep their inputs only, and compute the rest again in the backward pass (arXiv 1604.06174)."""
    unwrap(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    head = head_of(model)
    total = sum(_count(p) for p in (*model.parameters(), *(head.parameters() if head is not None else ())))
    return sum(p.numel() for p in trainable_parameters(model).values()), total


def _count(parameter: torch.nn.Parameter) -> int:
    """Numbers in a parameter; of 4-bit ones, not the bytes that hold two of them each."""
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else int(torch.Size(packed.shape).numel())


def save_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Write only what is trained: an adapter in PEFT's layout, or the changed weights; beside it the value head, if any."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(_plain(state), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _save_adapter_config(model.active_peft_config, folder)
    else:
        save_file(_plain(_own_trainable(model)), folder / TRAINABLE_WEIGHTS, metadata={"format": "pt"})
    write_origin(model, folder, finished=False)
    _save_head(model, folder)


def _save_head(model: torch.nn.Module, folder: Path) -> None:
    if (head := head_of(model)) is not None:
        save_value_head(head, folder)


def _plain(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """On the host; a tensor that layers share is written for each of them, as PEFT does."""
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        own = tensor.detach().to("cpu").contiguous()
        place = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if place in seen else own
        seen.add(place)
    return plain


def _save_adapter_config(config: PeftConfig, folder: Path) -> None:
    values = config.to_dict()
    values["inference_mode"] = True
    for key, value in values.items():
        if isinstance(value, set):
            values[key] = sorted(value)
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def load_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Load what ``save_trainable`` wrote. Raises ModelError on missing, extra, misshapen or damaged tensors."""
    if isinstance(model, PeftModel):
        load_adapter_weights(model, folder)
    else:
        _fill(_own_trainable(model), _read(folder / TRAINABLE_WEIGHTS), folder / TRAINABLE_WEIGHTS)
    if (head := head_of(model)) is not None:
        head.load_state_dict(load_value_head(folder, head.width).state_dict())


def load_adapter_weights(model: PeftModel, folder: Path, adapter: str = "default", but: str | None = None) -> None:
    """Load the weights of an adapter. Raises ModelError on missing, extra, misshapen or damaged tensors.

    Args:
        model: has the adapter.
        folder: of the weights.
        adapter: its name in the model.
        but: a tensor that is left out.
    """
    path = folder / ADAPTER_WEIGHTS
    state = {name: tensor for name, tensor in _read(path).items() if name != but}
    _compare(state, get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False), path)
    set_peft_model_state_dict(model, state, adapter_name=adapter)


def load_trainable_params(model: torch.nn.Module, folder: Path) -> None:
    """Load a checkpoint that holds only some of a model's parameters, whether or not they are to be trained now.

    Raises:
        ModelError: no such file, a name or shape that the model does not have, a damaged tensor.
    """
    path = folder / TRAINABLE_WEIGHTS
    state = _read(path)
    parameters = dict(model.named_parameters())
    if unknown := sorted(state.keys() - parameters.keys()):
        raise ModelError(f"{path}: does not fit the model, which has no {', '.join(unknown[:3])}")
    _fill({name: parameters[name] for name in state}, state, path)


def _read(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    return state


@torch.no_grad()
def _fill(parameters: dict[str, torch.nn.Parameter], state: dict[str, torch.Tensor], path: Path) -> None:
    _compare(state, parameters, path)
    for name, parameter in parameters.items():
        parameter.copy_(state[name])


def _compare(state: dict[str, torch.Tensor], expected: dict[str, Any], path: Path) -> None:
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or extra:
        raise ModelError(f"{path}: does not fit the model: missing {missing[:3] or 'none'}, unexpected {extra[:3] or 'none'}")
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, the model expects {tuple(expected[name].shape)}; "
                "was lora_rank changed?"
            )


def stop_at(model: torch.nn.Module, ends: Sequence[int]) -> None:
    """Add the tokens that end a turn to those at which generation with the model's saved configuration stops."""
    settings = unwrap(model).generation_config
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [known]
    stops = list(dict.fromkeys([*(end for end in known if end is not None), *ends]))
    settings.eos_token_id = stops[0] if len(stops) == 1 else stops


def save_finished(model: torch.nn.Module, folder: Path) -> None:
    """Write the result for use elsewhere: an adapter for the base, or a whole model in Transformers' layout.

    What lies between the base and the adapter (``beneath``) is joined with it, so that it fits the base as it is. A value head
    goes beside either, and so does how the model generates, and at which tokens it stops.
    """
    beneath = beneath_of(model)
    if isinstance(model, PeftModel) and beneath:
        _save_joined(model, beneath, folder)
        _save_head(model, folder)
    elif isinstance(model, PeftModel):
        save_trainable(model, folder)
    else:
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(folder)
        _save_head(model, folder)
    write_origin(model, folder, finished=True)
    settings = unwrap(model).generation_config
    if isinstance(model, PeftModel) and settings is not None:
        settings.to_json_file(folder / GENERATION_CONFIG)  # save_pretrained refuses what many bases have


def set_beneath(model: torch.nn.Module, beneath: list[Factors]) -> None:
    """Remember what lies between the original base and the adapter: adapters merged before, what PiSSA took out."""
    model.__dict__["_tunesmith_beneath"] = beneath


def beneath_of(model: torch.nn.Module) -> list[Factors]:
    """What ``set_beneath`` was given."""
    found: list[Factors] = model.__dict__.get("_tunesmith_beneath", [])
    return found


def _save_joined(model: PeftModel, beneath: list[Factors], folder: Path) -> None:
    """One LoRA adapter whose product is the sum of all: factors side by side, ranks added."""
    line = [own_factors(model), *beneath]
    state: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for name in sorted({name for factors in line for name in factors}):
        pairs = [factors[name] for factors in line if name in factors]
        state[f"base_model.model.{name}.lora_A.weight"] = torch.cat([down for down, _ in pairs], dim=0)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.cat([up for _, up in pairs], dim=1)
        ranks[name] = sum(len(down) for down, _ in pairs)
    save_file(_plain(state), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    rank = max(ranks.values())
    own = {name: number for name, number in ranks.items() if number != rank}
    config = replace(
        model.peft_config["default"], r=rank, lora_alpha=rank, rank_pattern=own, alpha_pattern=dict(own),
        use_rslora=False, init_lora_weights=True, target_modules=sorted(ranks),
    )  # fmt: skip
    _save_adapter_config(config, folder)


def own_factors(model: PeftModel, adapter: str = "default") -> Factors:
    """The low-rank factors of an adapter, scaled, by layer; only of linear layers."""
    return {
        name: (module.lora_A[adapter].weight.detach().float().clone(),
               module.lora_B[adapter].weight.detach().float() * module.scaling[adapter])
        for name, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.lora_A
    }  # fmt: skip


def load_finished(base: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Put a finished adapter on its base model, for inference. Raises ModelError when they do not fit, or it is a pickle."""
    check_adapter_folder(folder)
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder}: the adapter cannot be loaded: {reason[0] if reason else error}") from error
