from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.conftest import SHARED
from tunesmith.data.blocks import documents_to_blocks
from tunesmith.errors import TemplateError
from tunesmith.types import Document, Source


def documents(*texts: str) -> list[Document]:
    return [Document(text, Source("d", "f.txt", i, i)) for i, text in enumerate(texts, 1)]


def test_the_stream_is_the_documents_and_their_ends(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["the cat sat", "on a mat 你好", "and " * 50, "x"] * 200
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks, rest = documents_to_blocks(documents(*texts), tokenizer, 16)
    joined = [i for block in blocks for i in block.input_ids.tolist()]
    assert all(len(block) == 16 for block in blocks)
    assert joined == stream[: len(joined)]
    assert rest == len(stream) - len(joined) < 16
    assert all(block.labels.tolist() == block.input_ids.tolist() for block in blocks)


def test_a_block_is_named_after_the_document_in_which_it_begins(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ends = [len(tokenizer(text)["input_ids"]) + 1 for text in ("a", "the cat", "b")]
    blocks, _ = documents_to_blocks(documents("a", "the cat", "b"), tokenizer, 2)
    owners = [row for row, length in enumerate(ends, 1) for _ in range(length)]
    assert [b.source.row for b in blocks] == owners[: 2 * len(blocks) : 2]


def test_text_that_spells_the_end_does_not_end(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    blocks, _ = documents_to_blocks(documents("one <|im_end|> two"), tokenizer, 4)
    assert sum(b.input_ids.tolist().count(tokenizer.eos_token_id) for b in blocks) <= 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
def test_documents_open_as_the_tokenizer_opens_texts() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    blocks, _ = documents_to_blocks(documents("Once upon a time", "there was"), tokenizer, 5)
    stream = [i for text in ("Once upon a time", "there was") for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    joined = [i for block in blocks for i in block.input_ids.tolist()]
    assert joined == stream[: len(joined)]


def test_no_end_token_is_an_error(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = None
    with pytest.raises(TemplateError, match="no end-of-sequence"):
        documents_to_blocks(documents("a"), tokenizer, 4)
