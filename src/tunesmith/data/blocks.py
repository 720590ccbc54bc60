"""Documents -> blocks of equal length, for pretraining."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.data.tokenize import Text, TextEncoder
from tunesmith.errors import TemplateError
from tunesmith.types import Document, Example, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256


def documents_to_blocks(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[list[Example], int]:
    """Lay documents end to end, each closed by the end-of-sequence token, and cut the stream into blocks.

    A document is opened as the tokenizer opens any text (by a beginning-of-sequence token, or by nothing). What the
    text itself spells is never a special token. Every token of a block is learned but its first, which nothing
    predicts. A block is named after the document in which it begins.

    Args:
        documents: in order.
        tokenizer: with an end-of-sequence token.
        length: tokens of a block.

    Returns:
        The blocks, and how many tokens at the end did not fill another one.

    Raises:
        TemplateError: the tokenizer has no end-of-sequence token.
    """
    blocks: list[Example] = []
    rest: list[tuple[np.ndarray, Source]] = []
    held = 0
    for ids, source in _tokens(documents, tokenizer):
        rest.append((ids, source))
        held += len(ids)
        if held >= length:
            made, rest = _cut(rest, length)
            blocks += made
            held = sum(len(ids) for ids, _ in rest)
    return blocks, held


def _tokens(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, Source]]:
    end = tokenizer.eos_token_id
    if end is None:
        raise TemplateError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token to put between documents"
        )
    opening = [i for i in tokenizer("")["input_ids"] if i != end]
    encoder = TextEncoder(tokenizer)
    stream = iter(documents)
    while chunk := list(islice(stream, _CHUNK)):
        texts = [Text(d.text, data=((0, len(d.text)),)) for d in chunk]
        for document, tokens in zip(chunk, encoder.encode(texts), strict=True):
            yield np.concatenate([opening, tokens.ids, [end]]).astype(np.int32), document.source


def _cut(pieces: list[tuple[np.ndarray, Source]], length: int) -> tuple[list[Example], list[tuple[np.ndarray, Source]]]:
    """Blocks of the joined pieces, and the pieces that are left."""
    stream = np.concatenate([ids for ids, _ in pieces])
    ends = np.cumsum([len(ids) for ids, _ in pieces])
    full = len(stream) // length * length
    blocks = []
    for begin in range(0, full, length):
        source = pieces[int(np.searchsorted(ends, begin, side="right"))][1]
        ids = stream[begin : begin + length]
        blocks.append(Example(ids, ids, source))
    left = [(stream[full:], pieces[-1][1])] if full < len(stream) else []
    return blocks, left
