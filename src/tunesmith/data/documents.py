"""Documents -> token streams for pretraining: each opened as the tokenizer opens a text, closed by the end token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.learned import Learned
from tunesmith.data.report import DataReport
from tunesmith.data.tokenize import LOST, Job, Text, TextEncoder, Tokens
from tunesmith.errors import TemplateError
from tunesmith.types import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class DocumentMaker:
    """Tokenises documents. What a text itself spells is never a special token.

    Args:
        tokenizer: with an end-of-sequence token.
        encoder: of that tokenizer.

    Raises:
        TemplateError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, encoder: TextEncoder) -> None:
        end = tokenizer.eos_token_id
        if end is None:
            raise TemplateError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token to put between documents"
            )
        self._opening = np.array([i for i in tokenizer("")["input_ids"] if i != end], dtype=np.int32)
        self._end = np.array([end], dtype=np.int32)
        self.encoder = encoder

    def render(self, row: Document, report: DataReport) -> Document:
        """A document needs no rendering."""
        return row

    def plan(self, rendered: Sequence[Document]) -> Job:
        """The texts; what they spell is never special."""
        return self.encoder.plan([Text(d.text, data=((0, len(d.text)),)) for d in rendered])

    def finish(self, rendered: Sequence[Document], tokens: Iterable[Tokens], report: DataReport) -> list[Learned]:
        """The tokens of each document, nothing marked as learned: blocks decide that."""
        made = []
        for document, own in zip(rendered, tokens, strict=True):
            if own.lost:
                report.add("note", "lost-text", LOST, document.source)
            made.append(Learned(np.concatenate([self._opening, own.ids, self._end]), (), document.source))
        report.kept += len(made)
        return made
