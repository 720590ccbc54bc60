"""Weights of an export: in which numbers, in files of which size."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """``5GB`` -> bytes. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|TB)", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2]] if match else 0
    if match is None or size < 1:
        raise ConfigError(f"--max-shard-size: {text!r} is no size; give a number and KB, MB, GB or TB, like 5GB")
    return int(size)


def cast(model: PreTrainedModel, dtype: torch.dtype, what: Path) -> PreTrainedModel:
    """The model in ``dtype``, in place. Raises ModelError when a weight is too large for it."""
    if model.dtype != dtype:
        model.to(dtype)
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"{what}: {name} has numbers that {_name(dtype)} cannot hold; use --dtype bf16")
    return model


def bytes_of(model: PreTrainedModel) -> int:
    """Bytes of the weights, shared ones once."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}.values())


def write_model(model: PreTrainedModel, folder: Path, shard: int) -> None:
    """Write weights and configuration in Transformers' layout. Raises ModelError when the library refuses."""
    try:
        model.save_pretrained(folder, max_shard_size=shard)
    except ValueError as error:
        raise ModelError(f"{folder}: the model cannot be written: {str(error).splitlines()[0]}") from error


def write_adapter(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Write an adapter in PEFT's layout: as it is, or in ``dtype``."""
    (folder / ADAPTER_CONFIG).write_bytes((source / ADAPTER_CONFIG).read_bytes())
    if dtype is None:
        (folder / ADAPTER_WEIGHTS).write_bytes((source / ADAPTER_WEIGHTS).read_bytes())
        return
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / ADAPTER_WEIGHTS).items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
