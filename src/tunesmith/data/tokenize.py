"""Rendered text -> token ids, with the tokens that belong to each learned span.

The only place that calls a tokenizer. Text that came from a message and happens to spell a special token
(``<|im_end|>`` typed by a user) is read as ordinary text; only what the template itself wrote is special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

_CACHED_WORDS = 1 << 17
_BYTE_ALPHABET = 256


class Text(NamedTuple):
    """A text to tokenise.

    Attributes:
        text: what the model sees.
        spans: character ranges to find again among the tokens, disjoint and in order.
        data: character ranges that came from messages or tools; what they spell is never special.
    """

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    data: tuple[tuple[int, int], ...] = ()


class Tokens(NamedTuple):
    """A tokenised text.

    Attributes:
        ids: int32 array ``[L]``.
        spans: token ranges, one per span of the text: the tokens that begin inside it.
        joined: whether a token begins before a span and reaches into it.
        guarded: whether the text spelled a special token that was read as ordinary text.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    joined: bool = False
    guarded: bool = False


class TextEncoder:
    """Tokenises texts in batches.

    Token positions come from the byte length of each token where the tokenizer is byte-level (the sum is checked
    against the text), else from the tokenizer's offsets, which cost more.

    Args:
        tokenizer: with a fast backend.

    Raises:
        TemplateError: the tokenizer has no fast backend.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise TemplateError(f"the tokenizer of {tokenizer.name_or_path!r} has no character offsets (no fast backend)")
        self.tokenizer = tokenizer
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._described: dict[str, Any] = json.loads(self._backend.to_str())
        if self._described["model"]["type"] == "BPE":
            self._backend.model._resize_cache(_CACHED_WORDS)  # more words remembered: the same ids, a fifth faster
        special = {t["content"] for t in self._described["added_tokens"] if t["special"]} | set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Token ids of each text, and where its spans lie among them."""
        if not texts:
            return []
        guarded = [index for index, text in enumerate(texts) if self.spells_special(text)]
        done: dict[int, Tokens] = {}
        if guarded:
            for index, tokens in zip(guarded, self._encode_guarded([texts[i] for i in guarded]), strict=True):
                done[index] = tokens
        plain = [index for index in range(len(texts)) if index not in done] if guarded else range(len(texts))
        for index, tokens in zip(plain, self._encode_plain([texts[i] for i in plain]), strict=True):
            done[index] = tokens
        return [done[index] for index in range(len(texts))]

    def spells_special(self, text: Text) -> bool:
        """Whether data in the text spell a special token, alone or together with what stands around them."""
        if not text.data or not self._special.search(text.text):
            return False
        return any(start < b and a < end for start, end in self._found(text.text) for a, b in text.data)

    def _found(self, text: str) -> list[tuple[int, int]]:
        return [found.span() for found in self._special.finditer(text)]

    # ---- the common case

    def _encode_plain(self, texts: Sequence[Text]) -> list[Tokens]:
        if self._byte_lengths is None:
            return self._encode_with_offsets(self._backend, texts)
        encoded = self._backend.encode_batch_fast([t.text for t in texts], add_special_tokens=False)
        return [self._measure(text, encoding) for text, encoding in zip(texts, encoded, strict=True)]

    def _measure(self, text: Text, encoding: Encoding) -> Tokens:
        assert self._byte_lengths is not None
        ids = np.array(encoding.ids, dtype=np.int32)
        if not text.spans:
            return Tokens(ids, ())
        ends = self._byte_lengths[ids].cumsum()
        plain, boundaries = text.text, [position for span in text.spans for position in span]
        if plain.isascii():
            total = len(plain)
        else:
            lengths = [len(plain[a:b].encode()) for a, b in pairwise((0, *boundaries, len(plain)))]
            *boundaries, total = np.cumsum(lengths).tolist()
        if not len(ends) or ends[-1] != total:  # a normaliser changed the text, or a token swallowed blanks around it
            return self._encode_with_offsets(self._backend, [text])[0]
        starts = ends - self._byte_lengths[ids]
        return _locate(ids, starts, boundaries, total)

    @staticmethod
    def _encode_with_offsets(backend: Tokenizer, texts: Sequence[Text]) -> list[Tokens]:
        encoded = backend.encode_batch([t.text for t in texts], add_special_tokens=False)
        return [
            _locate(
                np.array(encoding.ids, dtype=np.int32),
                np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0],
                [position for span in text.spans for position in span],
                len(text.text),
            )
            for text, encoding in zip(texts, encoded, strict=True)
        ]

    @cached_property
    def _byte_lengths(self) -> np.ndarray | None:
        """Bytes that each id stands for, or None where that is not a fixed number."""
        decoder = self._described["decoder"] or {}
        kinds = {decoder.get("type"), *(d["type"] for d in decoder.get("decoders", ()))}
        if self._described["model"]["type"] != "BPE" or kinds != {"ByteLevel"}:
            return None
        lengths = np.zeros(max(self._backend.get_vocab().values()) + 1, dtype=np.int64)
        for token, index in self._backend.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)  # one character of the byte alphabet is one byte
        for added in self._described["added_tokens"]:
            lengths[added["id"]] = len(added["content"].encode())
        return lengths

    # ---- text that spells special tokens

    def _encode_guarded(self, texts: Sequence[Text]) -> list[Tokens]:
        """Encode with a tokenizer whose special tokens have other names, which only the template's text is given."""
        backend, names = self._renamed
        renamed = [self._rename(text, names) for text in texts]
        return [tokens._replace(guarded=True) for tokens in self._encode_with_offsets(backend, renamed)]

    def _rename(self, text: Text, names: dict[str, str]) -> Text:
        """The text with the template's own special tokens renamed; ranges are moved along."""
        pieces, moves, position = [], [], 0
        data = _Ranges(text.data)
        cursor = 0
        while found := self._special.search(text.text, cursor):
            start, end = found.span()
            if data.touch(start, end):
                cursor = start + 1  # what data spell stays text; the template may begin a token right inside it
                continue
            name = names[found.group()]
            pieces += [text.text[position:start], name]
            moves.append((end, len(name) - (end - start)))
            position = cursor = end
        pieces.append(text.text[position:])
        spans = tuple((_moved(a, moves), _moved(b, moves)) for a, b in text.spans)
        return Text("".join(pieces), spans)

    @cached_property
    def _renamed(self) -> tuple[Tokenizer, dict[str, str]]:
        """A copy of the tokenizer in which every special token is spelled with private-use characters."""
        from tokenizers import Tokenizer

        described = json.loads(self._backend.to_str())
        contents = [t["content"] for t in described["added_tokens"] if t["special"]]
        contents += [t for t in self.tokenizer.all_special_tokens if t not in contents]
        names = {content: f"\ue000{index}\ue001" for index, content in enumerate(contents)}
        for added in described["added_tokens"]:
            added["content"] = names.get(added["content"], added["content"])
        model = described["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): index for token, index in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        described["post_processor"] = None
        return Tokenizer.from_str(json.dumps(described)), names


class _Ranges:
    """Disjoint ranges in order."""

    def __init__(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._ranges = [r for r in ranges if r[0] < r[1]]

    def touch(self, start: int, end: int) -> bool:
        return any(start < b and a < end for a, b in self._ranges)


def _moved(position: int, moves: Sequence[tuple[int, int]]) -> int:
    return position + sum(shift for end, shift in moves if end <= position)


def _locate(ids: np.ndarray, starts: np.ndarray, boundaries: Sequence[int], total: int) -> Tokens:
    """Token ranges of the spans given by ``boundaries`` (start, end, start, end, ...) in a text of length ``total``."""
    cuts = np.searchsorted(starts, boundaries).tolist()
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=True))
    following = [int(starts[cut]) if cut < len(starts) else total for cut in cuts[::2]]
    joined = any(next_start != begin for next_start, begin in zip(following, boundaries[::2], strict=True))
    return Tokens(ids, spans, joined)
