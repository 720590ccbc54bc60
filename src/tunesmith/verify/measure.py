"""What is compared, and the fresh process that compares it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith.errors import ModelError

PROMPTS = ("Once upon a time, there was", "The capital of France is", "def add(a, b):\n    return", "你好，请介绍一下你自己。")
TEXTS = (*PROMPTS, "  two  spaces,\ttab\n\n\nlines 1234567", "l'été — don't: 1,000.50 €", "한국어 と 日本語 🙂")
"""Texts whose tokens are compared."""

NEW_TOKENS = 8
_RANDOM_ROWS = 4
_ROW_LENGTH = 32
_SCRIPT = Path(__file__).with_name("plain.py")


@dataclass(frozen=True)
class Difference:
    """Between two sets of logits: the greatest, and the root mean square relative to that of the logits."""

    max: float
    relative: float


def model_at(path: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole model, as ``verify/plain.py`` takes it."""
    return {"path": path, "options": options or {}, "adapter": None, "weights": [], "vocabulary": None, "quantisation": None}


def test_rows(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of a few prompts, and of rows drawn at random; the same for the same tokenizer."""
    prompts = [tokenizer(text)["input_ids"][:_ROW_LENGTH] for text in PROMPTS]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, len(tokenizer), (_RANDOM_ROWS, _ROW_LENGTH), generator=generator)
    return [*prompts, *drawn.tolist()]


test_rows.__test__ = False  # type: ignore[attr-defined]


def in_fresh_process(asked: dict[str, Any]) -> dict[str, Any]:
    """Run ``verify/plain.py``. Raises ModelError with its last words when it fails."""
    command = [sys.executable, "-P", str(_SCRIPT)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ModelError(f"{asked['export']['path']}: plain transformers and PEFT cannot compare it: {reason}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
