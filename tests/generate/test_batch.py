"""Answers of the engine against the library's own, one by one; rows join, leave and do not know of each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.model.test_attention import MODELS, built
from tunesmith.config.arguments import GeneratingArguments
from tunesmith.generate.batch import BatchEngine
from tunesmith.model.forward import FlatForward, segments_work

LENGTHS = (29, 3, 11, 18, 5, 1, 11)
ENDS = (2, 7)
GREEDY = GeneratingArguments(do_sample=False, max_new_tokens=24)


def prompts_of(vocabulary: int = 64) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(8, vocabulary, (length,), generator=draw).tolist() for length in LENGTHS]


def engine_of(model: PreTrainedModel, slots: int = 4) -> BatchEngine:
    works, _ = segments_work(model)
    return BatchEngine(FlatForward(model, works), ENDS, torch.float32, slots)


def said(engine: BatchEngine, prompts: list[list[int]], args: GeneratingArguments, **options: int) -> list[list[list[int]]]:
    found = engine.answers(prompts, args, [(number,) for number in range(len(prompts))], **options)
    for answer in (one for row in found for one in row):
        assert answer.ids.dtype == np.int32 and answer.ended == (answer.ids[-1] in ENDS)
        assert not np.isin(answer.ids[:-1], ENDS).any()
    return [[answer.ids.tolist() for answer in row] for row in found]


def one_by_one(model: PreTrainedModel, prompts: list[list[int]], **options: object) -> list[list[list[int]]]:
    found = []
    for ids in prompts:
        given = {"attention_mask": torch.ones(1, len(ids), dtype=torch.long), "eos_token_id": list(ENDS), "pad_token_id": 0}
        made = model.generate(torch.tensor([ids]), **given, do_sample=False, max_new_tokens=24, **options)
        found.append([made[0, len(ids) :].tolist()])
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_answers_are_the_librarys(kind: str) -> None:
    """In four slots: rows of all lengths, longer than windows and chunks; what cannot be run in steps says why."""
    model = built(kind).eval()
    expected = one_by_one(model, prompts_of())
    engine = engine_of(model)
    assert (engine.reason != "") == (kind == "chunks")
    assert said(engine, prompts_of(), GREEDY) == expected
    assert engine.statistics.tokens == sum(len(row[0]) for row in expected) > 30
    assert engine.statistics.prompt_tokens == sum(LENGTHS)
