"""Feedback with mismatched answers: each prompt beside the answer of another row, for KTO's estimate of the divergence."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from tunesmith.data.kinds import Rows
from tunesmith.errors import DataError
from tunesmith.types import IGNORE_INDEX, Example, FeedbackExample


class MismatchedFeedback(Rows[FeedbackExample]):
    """Feedback of which each row knows its prompt with another row's answer.

    Rows are put in a seeded order, and each takes the answer of the one before it. So every answer is taken once, none by its
    own row, and a row has the same partner whatever batch it is in: what a reference says of the two can be kept.

    Args:
        rows: the feedback.
        seed: of the order.
        cutoff_len: tokens that a prompt with another answer may have; the end of a longer one is cut off.

    Raises:
        DataError: there is no other row.
    """

    def __init__(self, rows: Rows[FeedbackExample], seed: int, cutoff_len: int) -> None:
        if len(rows) < 2:
            raise DataError(
                f"stage kto compares each prompt with another row's answer, and there is one row: {rows[0].source}. Give more "
                "rows (a larger val_size, if it is of those held out), or set kto_loss: apo_zero_unpaired, which does not"
            )
        super().__init__(rows.selection, rows.kind)
        self.cutoff_len = cutoff_len
        order = np.random.default_rng(seed).permutation(len(rows))
        self.partners = np.empty_like(order)
        self.partners[order] = np.roll(order, 1)

    def item(self, index: int) -> FeedbackExample:
        """A row with its prompt beside its partner's answer."""
        row = super().item(index)
        other = super().item(int(self.partners[index]))
        return replace(row, mismatched=crossed(row.example, other.example, self.cutoff_len))

    def fingerprint(self) -> str:
        """SHA-256 of the rows and of who is whose partner."""
        facts = f"{super().fingerprint()} {self.cutoff_len} ".encode() + self.partners.astype("<i8").tobytes()
        return hashlib.sha256(facts).hexdigest()


def crossed(asked: Example, answered: Example, cutoff_len: int) -> Example:
    """The prompt of one row with the answer of another.

    Args:
        asked: whose prompt is taken: all before its first supervised token.
        answered: whose answer is taken: from its first supervised token to the last.
        cutoff_len: most tokens.

    Example:
        Prompt ``1 2`` with answer ``3``, and prompt ``4`` with answer ``5 6`` -> ``1 2 5 6``, of which ``5 6`` are supervised.
    """
    own, places = np.flatnonzero(asked.labels != IGNORE_INDEX), np.flatnonzero(answered.labels != IGNORE_INDEX)
    prompt, answer = asked.input_ids[: own[0]], answered.input_ids[places[0] : places[-1] + 1]
    ids = np.concatenate([prompt, answer])[:cutoff_len]
    labels = np.concatenate([np.full(len(prompt), IGNORE_INDEX, np.int32), answer])[:cutoff_len]
    return Example(ids, labels, asked.source)
