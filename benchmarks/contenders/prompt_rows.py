"""Alpaca rows as prompts, what is given as answers to them where none are sampled, and clocks."""

from __future__ import annotations

import time
from typing import Any

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def prompt_ids(tokenizer: Any, row: dict[str, str]) -> list[int]:
    """The question, up to where an answer begins."""
    question = "\n".join(part for part in (row["instruction"], row["input"]) if part)
    turns = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    return ids


def given_answer(tokenizer: Any, row: dict[str, str], new: int) -> list[int]:
    """The row's own answer and an end token, at most ``new`` tokens."""
    ids: list[int] = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id][:new]
