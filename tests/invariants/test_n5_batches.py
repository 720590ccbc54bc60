"""N5: a row is worth the same in a batch of unequal lengths as alone, end to end or padded on either side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.model.test_heads import shaken
from tunesmith.data.collator import collate
from tunesmith.data.padding import DynamicDataCollatorWithPadding
from tunesmith.model.forward import FlatForward, segments_work
from tunesmith.model.heads import ValueHead, row_scores
from tunesmith.types import IGNORE_INDEX, Example, Source

LENGTHS = (23, 3, 60, 9)


@pytest.fixture
def rows() -> list[Example]:
    """Rows whose last tokens are end and pad tokens, which are real."""
    draw = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = draw.integers(3, 200, length).astype(np.int32)
        ids[-2:] = 0
        labels = np.where(np.arange(length) < length // 3, IGNORE_INDEX, ids).astype(np.int32)
        made.append(Example(ids, labels, Source("rows", "rows.jsonl", number + 1, number + 1)))
    return made


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@torch.no_grad()
def test_n5_rewards_and_log_probabilities(model: Any, tiny_model: Path, rows: list[Example]) -> None:
    head = shaken(ValueHead(64))

    def seen(forward: FlatForward, some: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collate(some)
        logp_SV = forward.logits(batch).log_softmax(-1)
        return row_scores(forward, head, batch), logp_SV.gather(1, batch.targets_S[:, None])[:, 0]

    alone = [seen(FlatForward(model, segments=False), [row]) for row in rows]
    scores, logps = (torch.cat(parts) for parts in zip(*alone, strict=True))
    right = seen(FlatForward(model, segments=False), rows)
    inputs = DynamicDataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_model), "left")(rows)
    labels = inputs.pop("labels")[:, 1:]
    output = model(**inputs, output_hidden_states=True)
    wanted = labels != IGNORE_INDEX
    left = (
        head(output.hidden_states[-1][:, -1]),
        output.logits[:, :-1].log_softmax(-1)[wanted].gather(1, labels[wanted][:, None])[:, 0],
    )
    assert segments_work(model) == (True, "")
    for found in (right, left, seen(FlatForward(model, segments=True), rows)):
        torch.testing.assert_close(found[0], scores, rtol=0, atol=1e-4)
        torch.testing.assert_close(found[1], logps, rtol=0, atol=1e-4)
    assert scores.std() > 0.1


@torch.no_grad()
def test_n5_greedy_text(model: Any, tiny_model: Path, rows: list[Example]) -> None:
    """Prompts padded on the left are gone on with as alone."""
    collator = DynamicDataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_model))

    def answers(some: list[Example]) -> list[list[int]]:
        inputs = collator([{"input_ids": row.input_ids} for row in some])
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        made = model.generate(**asked, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        return made[:, asked["input_ids"].shape[1] :].tolist()

    together = answers(rows)
    assert together == [answers([row])[0] for row in rows]
    assert len({tuple(answer) for answer in together}) > 1
