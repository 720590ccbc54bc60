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
import transformers
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.utils import logging

Rows = list[list[int]]


def compare(asked: dict[str, Any]) -> dict[str, Any]:
    """Compare logits and greedy continuations.

    Args:
        asked: ``reference`` and ``export``, each ``{path, options, adapter, weights, vocabulary, quantisation}`` as
            ``_load`` takes them; ``tokens``, of how many the logits are compared;
            ``rows`` of token ids, ``prompts`` the number of rows at the beginning that are continued, ``new_tokens`` how far;
            ``merged`` a safetensors file with logits ``0``, ``1``, ... of the merged model before it was written, or null;
            ``trained_on`` as ``reference``, or null; ``texts`` with the token ids that the run's tokenizer gives each.

    Returns:
        ``export``: greatest difference ``max`` and its root mean square relative to that of the logits, ``relative``;
        ``merged`` the same before writing, ``trained_on`` the same between the base as it was trained on and the reference;
        ``tokenizer``, which class gives these ids: ``auto``, ``fast`` or ``neither``;
        ``largest_logit``, ``agree`` of ``prompts`` continuations, ``missing`` and
        ``unexpected`` names of weights.
    """
    rows, count, length, width = asked["rows"], asked["prompts"], asked["new_tokens"], asked["tokens"]
    model, _ = _load(**asked["reference"])
    reference, told = _logits(model, rows), _continue(model, rows[:count], length)
    del model
    gc.collect()
    model, info = _load(**asked["export"])
    exported, again = _logits(model, rows), _continue(model, rows[:count], length)
    del model
    gc.collect()
    result = {
        "tokenizer": _tokenizer(asked["export"], asked["texts"]) if asked["texts"] else None,
        "export": _difference(exported, reference, width),
        "largest_logit": max(float(t[:, :width].abs().max()) for t in reference),
        "agree": sum(one == other for one, other in zip(told, again, strict=True)),
        "prompts": count,
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
    }
    if asked["merged"]:
        stored = load_file(asked["merged"])
        result["merged"] = _difference([stored[str(i)] for i in range(len(rows))], reference, width)
    if asked["trained_on"]:
        model, _ = _load(**asked["trained_on"])
        result["trained_on"] = _difference(_logits(model, rows), reference, width)
    return result


def _tokenizer(export: dict[str, Any], texts: dict[str, list[int]]) -> str:
    """Which class reads the tokenizer so that it gives the ids of ``texts``."""
    folder, options = export["adapter"] or export["path"], export["options"]
    for name, loader in (("auto", AutoTokenizer), ("fast", PreTrainedTokenizerFast)):
        tokenizer = loader.from_pretrained(folder, **options)  # raises if it does not load
        if all(tokenizer(text)["input_ids"] == ids for text, ids in texts.items()):
            return name
    return "neither"


def _load(
    path: str,
    options: dict[str, Any],
    adapter: str | None,
    weights: list[str],
    vocabulary: list[int] | None,
    quantisation: dict[str, Any] | None,
) -> tuple[torch.nn.Module, dict[str, Any]]:
    extra: dict[str, Any] = {}
    if quantisation:
        extra = {"quantization_config": BitsAndBytesConfig(**quantisation), "device_map": {"": "cpu"}}
    elif "gguf_file" in options and hasattr(transformers, "GgufConfig"):  # releases that can keep the blocks packed
        extra = {"quantization_config": transformers.GgufConfig(dequantize=True)}
    model, info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **extra, **options
    )
    for module in model.modules() if quantisation else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # else bitsandbytes packs anew, for other kernels than training had
            module.support_avx512bf16_for_cpu = False
    if vocabulary:
        _add_rows(model, *vocabulary)
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


@torch.no_grad()
def _add_rows(model: Any, known: int, total: int) -> None:
    """Rows for tokens beyond the ``known`` ones, each the mean of those, as they were when training began."""
    rows = model.get_input_embeddings().num_embeddings
    known = min(known, rows)
    if total > rows:
        model.resize_token_embeddings(total, pad_to_multiple_of=1 if rows % 64 else 64, mean_resizing=False)
    if total > known:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        ends = [embedding.weight, *([] if head is None or head.weight is embedding.weight else [head.weight])]
        for weight in [*ends, *([] if getattr(head, "bias", None) is None else [head.bias])]:
            weight[known:total] = weight[:known].float().mean(0).to(weight.dtype)


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


def _difference(found: list[torch.Tensor], expected: list[torch.Tensor], width: int) -> dict[str, float]:
    if found[0].shape[-1] < width:
        raise SystemExit(f"the export has logits for {found[0].shape[-1]} tokens, its tokenizer has {width}")
    one, other = (torch.cat([rows[:, :width] for rows in logits]).double() for logits in (found, expected))
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
