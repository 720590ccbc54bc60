"""Base weights in 8 or 4 bits, through bitsandbytes; checkpoints that were quantised elsewhere."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

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
