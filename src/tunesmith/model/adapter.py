"""What is trained: LoRA adapters in PEFT's format, or all weights. Saving and loading of just that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tunesmith.config.arguments import FinetuningArguments
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter_folder

TRAINABLE_WEIGHTS = "trainable.safetensors"


def init_adapter(
    model: PreTrainedModel, args: FinetuningArguments, base_name: str, rows: Mapping[str, list[int]] | None = None
) -> torch.nn.Module:
    """Make the model trainable as ``finetuning_type`` says.

    Trainable weights are float32, whatever the base computes in.

    Args:
        model: changed in place.
        args: of the tuning.
        base_name: noted in the adapter's configuration as the model it belongs to.
        rows: name of a layer -> ids of tokens whose rows are learned with the adapter (``vocabulary.trainable_rows``).

    Raises:
        ConfigError: ``lora_target`` names no linear layer of this model.
    """
    if args.finetuning_type == "full":
        model.float().requires_grad_(True)
        return model
    model.requires_grad_(False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=args.lora_alpha if args.lora_alpha is not None else 2 * args.lora_rank,
        lora_dropout=args.lora_dropout,
        target_modules=_targets(model, args.lora_target),
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        trainable_token_indices=dict(rows) if rows else None,
    )
    tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
    tuned.active_peft_config.base_model_name_or_path = base_name
    return tuned


def unwrap(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model inside an adapted one."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(inner, PreTrainedModel)
    return inner


def _targets(model: PreTrainedModel, asked: tuple[str, ...]) -> list[str]:
    linear = {name.rpartition(".")[2] for name, _ in linear_layers(model)}
    if asked == ("all",):
        return sorted(linear)
    unknown = [name for name in asked if name not in linear]
    if unknown:
        raise ConfigError(
            f"lora_target: {', '.join(unknown)}: no such linear layer; this model has {', '.join(sorted(linear))}"
        )
    return list(asked)


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Every linear layer but the output head, with its full name."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name, module


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter for all that receive gradients."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    total = sum(p.numel() for p in model.parameters())
    return sum(p.numel() for p in trainable_parameters(model).values()), total


def save_trainable(model: torch.nn.Module, folder: Path) -> None:
    """Write only what is trained: an adapter in PEFT's layout, or the changed weights."""
    if isinstance(model, PeftModel):
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
        save_file(_plain(state), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        _save_adapter_config(model.active_peft_config, folder)
    else:
        save_file(_plain(trainable_parameters(model)), folder / TRAINABLE_WEIGHTS, metadata={"format": "pt"})


def _plain(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in state.items()}


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
    is_adapter = isinstance(model, PeftModel)
    path = folder / (ADAPTER_WEIGHTS if is_adapter else TRAINABLE_WEIGHTS)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    expected = get_peft_model_state_dict(model, save_embedding_layers=False) if is_adapter else trainable_parameters(model)
    _compare(state, expected, path)
    if is_adapter:
        set_peft_model_state_dict(model, state)
    else:
        with torch.no_grad():
            for name, parameter in trainable_parameters(model).items():
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


def save_finished(model: torch.nn.Module, folder: Path) -> None:
    """Write the result for use elsewhere: an adapter, or a whole model in Transformers' layout."""
    if isinstance(model, PeftModel):
        save_trainable(model, folder)
    else:
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(folder)


def load_finished(base: PreTrainedModel, folder: Path) -> torch.nn.Module:
    """Put a finished adapter on its base model, for inference. Raises ModelError when they do not fit, or it is a pickle."""
    check_adapter_folder(folder)
    try:
        return PeftModel.from_pretrained(base, folder, is_trainable=False).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder}: the adapter cannot be loaded: {reason[0] if reason else error}") from error
