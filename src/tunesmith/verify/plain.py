"""Run by itself in a fresh process: compares an exported model with base and adapter. Plain transformers and PEFT only.

Reads a JSON object from standard input (``compare`` says which), writes one to standard output. One model is in memory at a
time; all arithmetic is float32, whatever the weights are stored in.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging

Rows = list[list[int]]


def compare(asked: dict[str, Any]) -> dict[str, Any]:
    """Compare logits and greedy continuations.

    Args:
        asked: ``reference`` and ``export``, each ``{path, options, adapter, weights, quantisation}`` as ``_load`` takes them;
            ``rows`` of token ids, ``prompts`` the number of rows at the beginning that are continued, ``new_tokens`` how far;
            ``merged`` a safetensors file with logits ``0``, ``1``, ... of the merged model before it was written, or null;
            ``trained_on`` as ``reference``, or null.

    Returns:
        ``export``: greatest difference ``max`` and its root mean square relative to that of the logits, ``relative``;
        ``merged`` the same before writing, ``trained_on`` the same between the base as it was trained on and the reference;
        ``largest_logit``, ``agree`` of ``prompts`` continuations, ``tokenizer`` the number of its tokens, ``missing`` and
        ``unexpected`` names of weights.
    """
    rows, count, length = asked["rows"], asked["prompts"], asked["new_tokens"]
    model, _ = _load(**asked["reference"])
    reference, told = _logits(model, rows), _continue(model, rows[:count], length)
    del model
    gc.collect()
    model, info = _load(**asked["export"])
    exported, again = _logits(model, rows), _continue(model, rows[:count], length)
    del model
    gc.collect()
    tokenizer = AutoTokenizer.from_pretrained(asked["export"]["adapter"] or asked["export"]["path"])
    result = {
        "export": _difference(exported, reference),
        "largest_logit": max(float(t.abs().max()) for t in reference),
        "agree": sum(one == other for one, other in zip(told, again, strict=True)),
        "prompts": count,
        "tokenizer": len(tokenizer),
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }
    if asked["merged"]:
        stored = load_file(asked["merged"])
        result["merged"] = _difference([stored[str(i)] for i in range(len(rows))], reference)
    if asked["trained_on"]:
        model, _ = _load(**asked["trained_on"])
        result["trained_on"] = _difference(_logits(model, rows), reference)
    return result


def _load(
    path: str, options: dict[str, Any], adapter: str | None, weights: list[str], quantisation: dict[str, Any] | None
) -> tuple[torch.nn.Module, dict[str, Any]]:
    extra = {"quantization_config": BitsAndBytesConfig(**quantisation), "device_map": {"": "cpu"}} if quantisation else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **extra, **options
    )
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for folder in weights:
            for name, tensor in load_file(Path(folder) / "trainable.safetensors").items():
                parameters[name].copy_(tensor)
    if adapter:
        if rows := _embedding_rows(model, Path(adapter)):
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), info


def _embedding_rows(model: Any, adapter: Path) -> int | None:
    """Rows of the embedding that the adapter brings, where they are not the base's."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith(f".{name}.weight") and file.get_slice(key).get_shape()[0] != embedding.num_embeddings:
                return int(file.get_slice(key).get_shape()[0])
    return None


@torch.no_grad()
def _logits(model: torch.nn.Module, rows: Rows) -> list[torch.Tensor]:
    return [model(input_ids=torch.tensor([row])).logits[0].float() for row in rows]


@torch.no_grad()
def _continue(model: Any, rows: Rows, length: int) -> list[list[int]]:
    """The likeliest next token, again and again; the settings saved with the model play no part."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.generation_config = GenerationConfig()
    settings = GenerationConfig(do_sample=False, max_new_tokens=length, pad_token_id=0)
    told = []
    for row in rows:
        ids = torch.tensor([row])
        answer = base.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        told.append(answer[0, len(row) :].tolist())
    return told


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    width = min(found[0].shape[-1], expected[0].shape[-1])
    if found[0].shape[-1] != expected[0].shape[-1]:
        raise SystemExit(f"the export tells {found[0].shape[-1]} tokens apart, base and adapter {expected[0].shape[-1]}")
    one = torch.cat([t.reshape(-1, width) for t in found]).double()
    other = torch.cat([t.reshape(-1, width) for t in expected]).double()
    return {
        "max": float((one - other).abs().max()),
        "relative": float((one - other).square().mean().sqrt() / other.square().mean().sqrt()),
    }


def main() -> None:
    """Compare as asked, and make sure that nothing of ours had a part in it."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    result = compare(json.load(sys.stdin))
    if any(name.partition(".")[0] == "tunesmith" for name in sys.modules):
        raise SystemExit("a module of tunesmith was imported; the comparison is to be independent")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
