"""The next token of each of several rows, from logits, as transformers' processors and warpers would have it.

In their order: penalty on tokens of the row, repair of scores that are no numbers, temperature, the ``top_k`` likeliest tokens,
the smallest set of these with probability ``top_p``; then a draw, or the likeliest. The vocabulary is never sorted: the
likeliest tokens are looked for in the blocks with the highest scores, and a draw from all tokens looks for its block first.

Each row has a stream of random numbers of its own (Philox; Salmon et al., SC 2011), named by a seed and the row's key, and
takes one number of it for each token: what a row says depends on no other row.

``B`` rows, ``V`` vocabulary, ``C`` candidates of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from tunesmith.config.arguments import GeneratingArguments
from tunesmith.generate.logits import repair

_BLOCK = 64
"""Tokens of a block. Of 32 to 256 the fastest for a vocabulary of 49,152."""
_CACHED = 1 << 20
"""Bytes of float32 scores that are looked at together. 64 rows of 49,152 take 3 ms so, and 22 ms at once."""
_FIRST_LOOK = 256
"""Candidates among which the set of ``top_p`` is looked for first; eight times as many each time that they do not suffice."""


def stream(seed: int, key: Sequence[int]) -> np.random.Generator:
    """The random numbers of a row.

    Args:
        seed: of all rows.
        key: of this one; numbers from 0.
    """
    words = np.random.SeedSequence([seed, *key]).generate_state(2, np.uint64)
    return np.random.Generator(np.random.Philox(key=words))


def choose(
    logits_BV: torch.Tensor,
    args: GeneratingArguments,
    streams: Sequence[np.random.Generator],
    tokens_BL: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row.

    Args:
        logits_BV: of any floating dtype; not changed.
        args: how to choose.
        streams: of the rows; not asked where nothing is drawn.
        tokens_BL: what each row has so far, filled up with tokens of the same row; read where there is a penalty.

    Returns:
        int64 ``[B]`` on the host, and bool ``[B]``, whether a row's scores had to be repaired.
    """
    parts = [
        _chosen(logits_BV[rows], args, streams[rows], None if tokens_BL is None else tokens_BL[rows])
        for rows in _in_cache(logits_BV)
    ]
    tokens, repaired = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(repaired)


def _in_cache(logits_BV: torch.Tensor) -> Iterator[slice]:
    """Rows that are looked at together: on a CPU so few that their scores stay in the cache from one look to the next."""
    rows, vocabulary = logits_BV.shape
    count = max(1, _CACHED // (4 * vocabulary)) if logits_BV.device.type == "cpu" else rows
    return (slice(begin, begin + count) for begin in range(0, rows, max(count, 1)))


def _chosen(
    logits_BV: torch.Tensor,
    args: GeneratingArguments,
    streams: Sequence[np.random.Generator],
    tokens_BL: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some rows."""
    scores_BV = logits_BV.float()
    if args.repetition_penalty != 1.0:
        assert tokens_BL is not None, "a penalty needs to know what was said"
        scores_BV = _penalised(scores_BV, tokens_BL, args.repetition_penalty)
    scores_BV, repaired_B = repair(scores_BV)
    if not args.do_sample:
        return scores_BV.argmax(-1).cpu(), repaired_B.cpu()
    draws_B = torch.tensor([one.random() for one in streams], dtype=torch.float64)
    if args.top_k == 0 and args.top_p == 1.0:
        return _from_all(scores_BV, args.temperature, draws_B), repaired_B.cpu()
    ids_BC, kept_BC = candidates(scores_BV, args)
    return _drawn(ids_BC, kept_BC, draws_B), repaired_B.cpu()


def candidates(scores_BV: torch.Tensor, args: GeneratingArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that ``top_k`` and ``top_p`` leave, and their probabilities: ``[B, C]`` each, likeliest first, 0 where none is.

    Tokens that are as likely as the last of ``top_k`` stay, as in transformers.
    """
    if args.top_k:
        scores_BC, ids_BC = _at_least(scores_BV, min(args.top_k, scores_BV.shape[1]))
        scores_BC = scores_BC / args.temperature
        p_BC = torch.softmax(scores_BC.double(), -1)
    else:
        total_B1 = torch.logsumexp(scores_BV / args.temperature, -1, keepdim=True)
        count = _FIRST_LOOK
        while True:
            scores_BC, ids_BC = _largest(scores_BV, min(count, scores_BV.shape[1]))
            p_BC = (scores_BC / args.temperature - total_B1).double().exp()
            if count >= scores_BV.shape[1] or (p_BC.sum(-1) > args.top_p + 1e-4).all():
                break
            count *= 8
    if args.top_p < 1.0:
        before_BC = p_BC.cumsum(-1) - p_BC
        p_BC = p_BC.masked_fill(before_BC >= args.top_p, 0.0)
    return ids_BC, p_BC / p_BC.sum(-1, keepdim=True)


def _penalised(scores_BV: torch.Tensor, tokens_BL: torch.Tensor, penalty: float) -> torch.Tensor:
    said_BL = scores_BV.gather(1, tokens_BL)
    return scores_BV.scatter(1, tokens_BL, torch.where(said_BL < 0, said_BL * penalty, said_BL / penalty))


def _drawn(ids_BC: torch.Tensor, p_BC: torch.Tensor, draws_B: torch.Tensor) -> torch.Tensor:
    sums_BC = p_BC.cpu().cumsum(-1)
    at_B1 = torch.searchsorted(sums_BC, draws_B[:, None] * sums_BC[:, -1:], right=True)
    last_B1 = (p_BC.cpu() > 0).sum(-1, keepdim=True) - 1  # candidates with any probability come first
    return ids_BC.cpu().gather(1, torch.minimum(at_B1, last_B1))[:, 0]


def _from_all(scores_BV: torch.Tensor, temperature: float, draws_B: torch.Tensor) -> torch.Tensor:
    """Inverse of the distribution function: the block first, then the token in it."""
    highest_B1 = scores_BV.amax(-1, keepdim=True)
    p_BnK = _blocks(((scores_BV - highest_B1) / temperature).exp_(), 0.0)
    sums_Bn = p_BnK.sum(-1, dtype=torch.float64).cpu().cumsum(-1)
    goal_B1 = draws_B[:, None] * sums_Bn[:, -1:]
    block_B1 = torch.searchsorted(sums_Bn, goal_B1, right=True).clamp_(max=sums_Bn.shape[1] - 1)
    rest_B1 = goal_B1 - torch.where(block_B1 > 0, sums_Bn.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
    rows_B = torch.arange(len(draws_B))
    inside_BK = p_BnK[rows_B.to(p_BnK.device), block_B1[:, 0].to(p_BnK.device)].double().cpu()
    at_B1 = torch.searchsorted(inside_BK.cumsum(-1), rest_B1, right=True)
    likely_BK = torch.where(inside_BK > 0, torch.arange(inside_BK.shape[1]), 0)
    return (block_B1 * _BLOCK + torch.minimum(at_B1, likely_BK.amax(-1, keepdim=True)))[:, 0]


def _blocks(numbers_BV: torch.Tensor, filled: float) -> torch.Tensor:
    """``[B, V / _BLOCK, _BLOCK]``, the last block filled up."""
    over = -numbers_BV.shape[1] % _BLOCK
    return (torch.nn.functional.pad(numbers_BV, (0, over), value=filled) if over else numbers_BV).unflatten(1, (-1, _BLOCK))


def _largest(scores_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest scores of each row, highest first, and their tokens. They lie in the blocks with the highest ones."""
    blocks_BnK = _blocks(scores_BV, -torch.inf)
    if count * 2 >= blocks_BnK.shape[1]:
        found = scores_BV.topk(count, dim=-1)
        return found.values, found.indices
    best_Bc = blocks_BnK.amax(-1).topk(count, dim=-1, sorted=False).indices
    inside_BcK = blocks_BnK.gather(1, best_Bc[..., None].expand(-1, -1, _BLOCK))
    values_BC, at_BC = inside_BcK.flatten(1).topk(count, dim=-1)
    return values_BC, best_Bc.gather(1, at_BC // _BLOCK) * _BLOCK + at_BC % _BLOCK


def _at_least(scores_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` highest scores and those equal to the last of them, filled up with ``-inf``, and their tokens."""
    lowest_B1 = _largest(scores_BV, count)[0][:, -1:]
    rows, tokens = (scores_BV >= lowest_B1).nonzero(as_tuple=True)
    counts_B = torch.bincount(rows, minlength=len(scores_BV))
    places = torch.arange(len(rows), device=rows.device) - (counts_B.cumsum(0) - counts_B)[rows]
    ids_BC = tokens.new_zeros(len(scores_BV), int(counts_B.max()))
    ids_BC[rows, places] = tokens
    found_BC = scores_BV.new_full(ids_BC.shape, -torch.inf)
    found_BC[rows, places] = scores_BV[rows, tokens]
    found_BC, order_BC = found_BC.sort(stable=True, dim=-1, descending=True)
    return found_BC, ids_BC.gather(1, order_BC)
