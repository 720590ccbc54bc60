"""How tokens are chosen, against transformers' processors and warpers and against frequencies; scores that are no numbers."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import tunesmith
from tunesmith.config.arguments import GeneratingArguments
from tunesmith.generate import sampling
from tunesmith.generate.logits import repair
from tunesmith.generate.sampling import candidates, choose, stream

NAN, INF = float("nan"), float("inf")


def logits_of(rows: int, vocabulary: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def theirs(scores_BV: torch.Tensor, args: GeneratingArguments) -> torch.Tensor:
    """Probabilities by the library, in its order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(args.temperature)])
    if args.top_k:
        warpers.append(TopKLogitsWarper(args.top_k))
    if args.top_p < 1:
        warpers.append(TopPLogitsWarper(args.top_p))
    return warpers(torch.zeros(len(scores_BV), 1, dtype=torch.long), scores_BV).softmax(-1)


@pytest.mark.parametrize("vocabulary", [33, 5000, 20_011])
@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(50, 0.9, 0.7), (7, 1.0, 1.0), (0, 0.9, 1.3), (0, 0.3, 0.5), (1, 0.9, 1.0), (0, 0.999, 2.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_are_the_librarys(vocabulary: int, top_k: int, top_p: float, temperature: float, dtype: torch.dtype) -> None:
    """With scores that are equal, too: of 16 bits many are."""
    args = GeneratingArguments(top_k=top_k, top_p=top_p, temperature=temperature)
    scores_BV = logits_of(6, vocabulary).to(dtype).float()
    scores_BV[2] *= 0.01  # nearly flat
    scores_BV[3, 5] = 60.0  # one token has it all
    scores_BV[4, ::2] = -INF
    ids_BC, p_BC = candidates(scores_BV, args)
    found_BV = torch.zeros(scores_BV.shape, dtype=torch.float64).scatter_add_(1, ids_BC, p_BC)
    expected_BV = theirs(scores_BV, args).double()
    if dtype == torch.float32:
        differ = (found_BV - expected_BV).abs().amax(-1)
        counts = ((found_BV > 0).sum(-1) - (expected_BV > 0).sum(-1)).abs()
        assert (counts <= (vocabulary > 33) * (top_p == 0.999)).all()  # there the library's own sum of 20,000 rounds
        assert (differ < 1e-5).all()
    else:  # which of equal tokens are the last of top_p is not said by either
        torch.testing.assert_close(found_BV.sort(-1).values, expected_BV.sort(-1).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.8), (20, 1.0), (20, 0.8)])
def test_frequencies(top_k: int, top_p: float) -> None:
    """Chi-square of 6,000 rows; streams named by consecutive keys are independent."""
    args = GeneratingArguments(top_k=top_k, top_p=top_p, temperature=1.5)
    logits_V, rows = logits_of(1, 150)[0], 6_000
    tokens_B, _ = choose(logits_V.expand(rows, -1), args, [stream(1, (row,)) for row in range(rows)])
    expected_V = theirs(logits_V[None], args)[0].double() * rows
    seen_V = torch.bincount(tokens_B, minlength=150).double()
    assert (seen_V[expected_V == 0] == 0).all()
    often = expected_V >= 5
    square = ((seen_V - expected_V) ** 2 / expected_V)[often].sum().item()
    freedom = int(often.sum())
    assert square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_row_draws_from_its_own_stream() -> None:
    one, again, other = ([stream(*name).random() for _ in range(3)] for name in ((3, (1, 2)), (3, (1, 2)), (3, (2, 1))))
    assert one == again and one != other and stream(4, (1, 2)).random() != one[0]
    logits_BV, args = logits_of(5, 300), GeneratingArguments(top_k=0, top_p=1.0)
    together, _ = choose(logits_BV, args, [stream(0, (row,)) for row in range(5)])
    alone = [choose(logits_BV[row : row + 1], args, [stream(0, (row,))])[0].item() for row in range(5)]
    assert together.tolist() == alone


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (5, 1.0)])
def test_the_ends_of_a_draw_are_tokens_that_can_come(draw: float, top_k: int, top_p: float) -> None:
    class Fixed:
        def random(self) -> float:
            return draw

    scores = torch.full((1, 130), -INF)
    scores[0, [3, 70, 100]] = torch.tensor([0.0, 1.0, -50.0])
    token = choose(scores, GeneratingArguments(top_k=top_k, top_p=top_p), [Fixed()])[0].item()  # type: ignore[list-item]
    assert token in (3, 70) or (token == 100 and draw > 0.5)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_penalty_is_the_librarys(penalty: float) -> None:
    logits_BV, tokens_BL = logits_of(4, 50), torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    args = GeneratingArguments(do_sample=False, repetition_penalty=penalty)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(tokens_BL, logits_BV)
    torch.testing.assert_close(sampling._penalised(logits_BV, tokens_BL, penalty), expected)
    assert choose(logits_BV, args, [], tokens_BL)[0].tolist() == expected.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_only_what_is_damaged_is_repaired(dtype: torch.dtype) -> None:
    scores = torch.tensor(
        [[1, 2, -INF], [1, NAN, 3], [1, INF, 3], [NAN, NAN, NAN], [-INF, -INF, -INF], [INF, -INF, INF], [NAN, -INF, -INF]],
        dtype=dtype,
    )
    before = scores.clone()
    found, damaged = repair(scores)
    expected = [[1, 2, -INF], [1, -INF, 3], [1, 3, 3], [0, 0, 0], [0, 0, 0], [0, -INF, 0], [0, -INF, -INF]]
    assert found.tolist() == expected
    assert damaged.tolist() == [False] + 6 * [True]
    assert torch.equal(scores.nan_to_num(7.0), before.nan_to_num(7.0))
    assert repair(scores[:1])[0].data_ptr() == scores.data_ptr()


def test_public_processor_counts_and_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    [processor] = tunesmith.get_logits_processor()
    assert isinstance(processor, tunesmith.InvalidScoreLogitsProcessor)
    ids, sound = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 3)
    with caplog.at_level(logging.WARNING):
        assert processor(ids, sound) is sound and processor.repaired == 0 and not caplog.records
        for _ in range(2):
            assert processor(ids, torch.tensor([[NAN, 1.0, 2.0], [1.0, 2.0, 3.0]])).isfinite().sum() == 5
    assert processor.repaired == 2
    assert len(caplog.records) == 1 and "no numbers" in caplog.text


def test_largest_with_few_and_many() -> None:
    scores = logits_of(3, 9000)
    for count in (1, 20, 60, 4000):
        values, ids = sampling._largest(scores, count)
        torch.testing.assert_close(values, scores.topk(count).values)
        torch.testing.assert_close(scores.gather(1, ids), values)
    assert np.isfinite(values.numpy()).all()
