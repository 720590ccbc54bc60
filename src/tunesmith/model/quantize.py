"""Base weights in 8 or 4 bits, through bitsandbytes; checkpoints that were quantised elsewhere."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from tunesmith.config.arguments import ModelArguments
from tunesmith.errors import ModelError


def quantisation(args: ModelArguments, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that load the base in ``quantization_bit`` bits; none where it is not set.

    4 bits: nf4 or fp4 (arXiv 2305.14314), the scales themselves quantised with ``double_quantization``. 8 bits: LLM.int8()
    (arXiv 2208.07339). The output head and embeddings stay as they are.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    if args.quantization_bit is None:
        return {}
    if find_spec("bitsandbytes") is None:
        raise ModelError("quantization_bit: needs the package bitsandbytes; install it with: pip install 'tunesmith[quant]'")
    if args.quantization_bit == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=args.quantization_type,
            bnb_4bit_use_double_quant=args.double_quantization,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def is_quantised(model: PreTrainedModel) -> bool:
    """Whether the base's weights are rounded to few bits, by us or by whoever made the checkpoint."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, "is_quantized", False))


def check_foreign(config: Any, args: ModelArguments, path: object) -> None:
    """Refuse a checkpoint that was quantised elsewhere in a way that cannot be loaded.

    Args:
        config: of the model, as transformers reads it.
        args: whether it is to be quantised here.
        path: of the model, for messages.

    Raises:
        ModelError: a method that transformers does not know, or a checkpoint that would be quantised twice.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    name = str(getattr(method, "value", method))
    if name not in AUTO_QUANTIZER_MAPPING and not name.startswith("bitsandbytes"):
        raise ModelError(
            f"{path}: its weights are quantised by {name}, which transformers {version('transformers')} does not know; take "
            "the full-precision model"
        )
    if args.quantization_bit is not None:
        raise ModelError(f"{path}: its weights are already quantised by {name}; remove quantization_bit")


def missing_library(config: Any, path: object, error: ImportError) -> ModelError:
    """What to say when the library of a foreign format is not installed."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    name = str(getattr(method, "value", method))
    return ModelError(f"{path}: its weights are quantised by {name}, whose library is missing: {str(error).splitlines()[0]}")


def keep_differentiable(model: torch.nn.Module) -> None:
    """Keep 4-bit layers from being packed for inference.

    On processors with bf16 instructions bitsandbytes packs a layer's weight anew at its first evaluation, for good, and the
    product of packed weights has no backward pass: whatever is trained below such a layer would get no gradient, without a
    word.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
