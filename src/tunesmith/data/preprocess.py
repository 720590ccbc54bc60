"""Rows in memory -> what a stage learns from, one function for each kind of stage.

Runs prepare their rows on disk instead (``data/pipeline.py``), with the same makers and so with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.config.arguments import DataArguments
from tunesmith.data.kinds import feedback_of, pair_of, prompt_of
from tunesmith.data.learned import Learned
from tunesmith.data.maker import make_all
from tunesmith.data.pipeline import make_maker
from tunesmith.data.prepare import count_blocks, make_recipe
from tunesmith.data.report import DataReport, reasons
from tunesmith.data.sniff import Target
from tunesmith.errors import DataError
from tunesmith.types import (
    Conversation,
    Document,
    Example,
    Feedback,
    FeedbackExample,
    PairExample,
    PreferencePair,
    Prompt,
    PromptExample,
    Row,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preprocess_data(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport, stage: str = "sft"
) -> list[Any]:
    """Render, tokenise and mask rows for a stage.

    Args:
        rows: of the kind that the stage needs.
        tokenizer: with a chat template, for dialogues.
        args: cutoff, truncation, date.
        report: what is left out, cut or remarkable goes there.
        stage: ``pt``, ``sft``, ``rm``, ``dpo``, ``kto``, ``ppo``, ``grpo`` or ``predict``.

    Raises:
        DataError: no row is left.
        KeyError: no such stage.
        TemplateError: the tokenizer cannot be used.
    """
    return _OF_STAGE[stage](rows, tokenizer, args, report)


def preprocess_supervised(
    rows: Iterable[Conversation], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport
) -> list[Example]:
    """Conversations, every assistant turn learned once. Args, raises: as ``preprocess_data``."""
    return [one.example() for one in _made("conversation", rows, tokenizer, args, report)]


def preprocess_pairwise(
    rows: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport
) -> list[PairExample]:
    """Both sides of each pair, the answers marked. Args, raises: as ``preprocess_data``."""
    made = _made("pair", rows, tokenizer, args, report)
    return [pair_of(better, worse) for better, worse in zip(made[::2], made[1::2], strict=True)]


def preprocess_feedback(
    rows: Iterable[Feedback], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport
) -> list[FeedbackExample]:
    """Dialogues, the judged answer marked. Args, raises: as ``preprocess_data``."""
    return [feedback_of(one) for one in _made("feedback", rows, tokenizer, args, report)]


def preprocess_generation(
    rows: Iterable[Prompt], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport
) -> list[PromptExample]:
    """Prompts that end where the model is to go on. Args, raises: as ``preprocess_data``."""
    return [prompt_of(one) for one in _made("prompt", rows, tokenizer, args, report)]


def preprocess_pretrain(
    rows: Iterable[Document], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport
) -> list[Example]:
    """Documents laid end to end, each closed by the end token, and cut into blocks of ``cutoff_len`` tokens.

    What does not fill the last block is counted as ``remainder``. Args, raises: as ``preprocess_data``.
    """
    made = _made("document", rows, tokenizer, args, report)
    stream = np.concatenate([one.ids for one in made])
    owners = np.searchsorted(np.cumsum([len(one.ids) for one in made]), np.arange(0, len(stream), args.cutoff_len), "right")
    count = count_blocks(len(made), len(stream), args.cutoff_len, report)
    blocks = stream[: count * args.cutoff_len].reshape(count, args.cutoff_len)
    return [Example(ids, ids, made[owner].source) for ids, owner in zip(blocks, owners.tolist(), strict=False)]


_OF_STAGE: Mapping[str, Callable[..., list[Any]]] = {
    "pt": preprocess_pretrain, "sft": preprocess_supervised, "rm": preprocess_pairwise, "dpo": preprocess_pairwise,
    "kto": preprocess_feedback, "ppo": preprocess_generation, "grpo": preprocess_generation,
    "predict": preprocess_generation,
}  # fmt: skip


def _made(
    target: Target, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, args: DataArguments, report: DataReport
) -> list[Learned]:
    maker, _ = make_maker(make_recipe(args, target), tokenizer)
    made = list(make_all(maker, rows, report))
    if not made:
        raise DataError("no trainable tokens in any row:\n  " + reasons(report.of("unreadable", "uncertified", "dropped")))
    return made
