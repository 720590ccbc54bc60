"""Which arithmetic the run uses, and on which device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """For the log; of a CPU, with the number of threads (``OMP_NUM_THREADS`` sets it)."""
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else str(device)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run at full speed on ``device``."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that ``auto``, ``bf16``, ``fp16`` or ``fp32`` means on ``device``."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    return DTYPES[name]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Context in which matrix products use ``dtype``; trainable weights stay fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def norms_to_float(model: torch.nn.Module, names: Sequence[str]) -> int:
    """Hold the weights of normalisations in fp32; what they give keeps the dtype of what they are given.

    Args:
        model: whose parameters of one dimension are looked at.
        names: parts of the names of those that are meant.

    Returns:
        How many parameters are in fp32 now that were not.
    """
    count = 0
    for module_name, module in model.named_modules():
        changed = False
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 1 and parameter.dtype != torch.float32 and _is_named(f"{module_name}.{name}", names):
                parameter.data = parameter.data.float()
                changed, count = True, count + 1
        if changed:
            module.register_forward_hook(_in_the_dtype_of_the_input)
    return count


def _is_named(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def _in_the_dtype_of_the_input(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    return output.to(inputs[0].dtype)
