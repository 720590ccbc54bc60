"""Documents -> token streams for pretraining: each opened as the tokenizer opens a text, closed by the end token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.learned import Learned
from tunesmith.data.report import DataReport
from tunesmith.data.tokenize import Text, TextEncoder
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
        self._encoder = encoder

    def finish(self, documents: Sequence[Document], report: DataReport) -> list[Learned]:
        """The tokens of each document, nothing marked as learned: blocks decide that."""
        texts = [Text(d.text, data=((0, len(d.text)),)) for d in documents]
        made = []
        for document, tokens in zip(documents, self._encoder.encode(texts), strict=True):
            ids = np.concatenate([self._opening, tokens.ids, self._end])
            made.append(Learned(ids, (), document.source))
        report.kept += len(made)
        return made
