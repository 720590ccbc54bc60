"""Answers to prompts by our engine or by the library's ``generate`` on one left-padded batch; each line is answered by all."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.contenders.bare import lora, turns
from tunesmith.config.arguments import GeneratingArguments
from tunesmith.generate.batch import BatchEngine
from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.model.lora_kernel import install_lora_kernel

Answering = Callable[[int], int]
"""Number of a round -> tokens of all answers, end tokens included, what stands behind them not."""


def main() -> None:
    """The work unit: sampled answers of a bf16 model, with an adapter that changes it or without."""
    folder, rows, unit = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")), json.loads(sys.argv[3])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    prompts = [tokenizer.apply_chat_template(turns(row)[:-1], **given) for row in rows]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(0)
    if unit["engine"] == "ours":
        segments_work(model)
    if unit["lora"]:
        model = get_peft_model(model, lora("CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.002)
    args = GeneratingArguments(max_new_tokens=unit["new"], top_k=unit["top_k"], top_p=unit["top_p"], temperature=1.0)
    make = _ours if unit["engine"] == "ours" else _library
    answer = make(model.eval(), tokenizer, prompts, args, unit["samples"])
    clock = time.process_time if unit["clock"] == "cpu" else time.perf_counter
    print(json.dumps({"ready": unit["engine"]}), flush=True)
    for number, _ in enumerate(sys.stdin):
        began = clock()
        tokens = answer(number)
        print(json.dumps({"seconds": clock() - began, "tokens": tokens, "loss": 0.0}), flush=True)


def _ours(model: Any, tokenizer: Any, prompts: list[list[int]], args: GeneratingArguments, samples: int) -> Answering:
    forward = FlatForward(model, segments=True)
    install_lora_kernel(forward, torch.bfloat16)
    engine = BatchEngine(forward, [tokenizer.eos_token_id], torch.bfloat16)

    def answer(number: int) -> int:
        keys = [(place,) for place in range(len(prompts))]
        return sum(len(one.ids) for row in engine.answers(prompts, args, keys, samples, seed=number) for one in row)

    return answer


def _library(model: Any, tokenizer: Any, prompts: list[list[int]], args: GeneratingArguments, samples: int) -> Answering:
    end, longest = tokenizer.eos_token_id, max(map(len, prompts))
    ids = torch.tensor([[end] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])

    def answer(number: int) -> int:
        torch.manual_seed(number)
        options = {**args.to_dict(), "eos_token_id": end, "pad_token_id": end, "num_return_sequences": samples}
        made = model.generate(input_ids=ids, attention_mask=mask, **options)[:, longest:].numpy()
        ended = made == end
        return int(np.where(ended.any(1), ended.argmax(1) + 1, made.shape[1]).sum())

    return answer


if __name__ == "__main__":
    main()
