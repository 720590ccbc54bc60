from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from tunesmith.data.padding import DynamicDataCollatorWithPadding, PairwiseDataCollatorWithPadding
from tunesmith.types import IGNORE_INDEX, Example, PairExample, Source

SOURCE = Source("d", "f", 1, 1)


def example(*ids: int) -> Example:
    array = np.array(ids, dtype=np.int32)
    return Example(array, np.where(array > 3, array, IGNORE_INDEX).astype(np.int32), SOURCE)


@pytest.fixture
def collator(tiny_model: Path) -> DynamicDataCollatorWithPadding:
    return DynamicDataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_model))


def test_left_padding_by_hand(collator: DynamicDataCollatorWithPadding) -> None:
    batch = collator([example(5, 0, 7), example(9)])
    assert batch["input_ids"].tolist() == [[5, 0, 7], [0, 0, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch["labels"].tolist() == [[5, -100, 7], [-100, -100, 9]]


def test_a_real_token_that_equals_the_pad_stays(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    end = tokenizer.eos_token_id
    rows = [{"input_ids": [4, 5, end], "labels": [-100, 5, end]}, {"input_ids": [7, end], "labels": [7, end]}]
    batch = DynamicDataCollatorWithPadding(tokenizer)(rows)
    assert batch["labels"].tolist() == [[-100, 5, end], [-100, 7, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_equals_the_librarys_collator(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [{"input_ids": list(range(4, 4 + n)), "labels": list(range(4, 4 + n))} for n in (3, 7, 1)]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        theirs = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=4)([dict(row) for row in rows])
        ours = DynamicDataCollatorWithPadding(tokenizer, side, 4)(rows)
        for key in ("input_ids", "attention_mask", "labels"):
            assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_score_as_alone(tiny_model: Path, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    rows = [example(*range(10, 10 + n)) for n in (9, 2, 5)]
    collate = DynamicDataCollatorWithPadding(tokenizer, side)
    with torch.no_grad():
        together = collate(rows)
        mask = together["attention_mask"].bool()
        logits = model(**together).logits
        for index, row in enumerate(rows):
            alone = model(**collate([row])).logits[0]
            torch.testing.assert_close(logits[index][mask[index]], alone, rtol=1e-4, atol=1e-4)


def test_pairs_are_chosen_first(tiny_model: Path) -> None:
    collate = PairwiseDataCollatorWithPadding(AutoTokenizer.from_pretrained(tiny_model))
    pairs = [PairExample(example(4, 5), example(4, 6, 7), SOURCE), PairExample(example(8), example(9), SOURCE)]
    batch = collate(pairs)
    assert batch["input_ids"].tolist() == [[0, 4, 5], [0, 0, 8], [4, 6, 7], [0, 0, 9]]
    plain = [{"chosen": p.chosen, "rejected": p.rejected} for p in pairs]
    assert torch.equal(collate(plain)["labels"], batch["labels"])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "at least one row"),
        ([{"input_ids": []}], "at least one token"),
        ([{"input_ids": [1, 2], "labels": [1]}], "as many entries"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "some have none"),
    ],
)
def test_bad_rows(collator: DynamicDataCollatorWithPadding, rows: list[dict[str, list[int]]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        collator(rows)
