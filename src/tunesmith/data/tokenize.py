"""Rendered text -> token ids, with the tokens that belong to each learned span.

The only place that calls a tokenizer. Text that came from a message and happens to spell a special token
(``<|im_end|>`` typed by a user) is read as ordinary text; only what the template itself wrote is special.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tunesmith.errors import TemplateError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

_CACHED_WORDS = 1 << 17
_BYTE_ALPHABET = 256
LOST = "the tokenizer has no token for some characters of the text; they are left out, or unknown to the model"
"""Remark on a row of which the tokenizer cannot say everything."""


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
        lost: whether the tokenizer has no token for some of the text, white space aside.
    """

    ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    joined: bool = False
    guarded: bool = False
    lost: bool = False


class Job(NamedTuple):
    """Texts to tokenise together.

    Attributes:
        plain: those that need no care.
        guarded: places, among all texts, of those in which data spell a special token.
        renamed: those texts, with the template's own special tokens under other names.
    """

    plain: tuple[Text, ...]
    guarded: tuple[int, ...] = ()
    renamed: tuple[Text, ...] = ()


class Encodings(NamedTuple):
    """The tokenizer's answers to the plain and to the renamed texts of a job."""

    plain: list[Encoding]
    renamed: list[Encoding]


class TextEncoder:
    """Tokenises texts in batches, in one call or in three steps: ``plan``, ``run``, ``locate``.

    Token positions come from the byte length of each token where the tokenizer is byte-level (the sum is checked
    against the text), else from the tokenizer's offsets, which cost more.

    Args:
        tokenizer: with a fast backend.

    Attributes:
        digest: SHA-256 of the tokenizer.

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
        text = self._backend.to_str()
        self.digest = hashlib.sha256(text.encode()).hexdigest()
        self._described: dict[str, Any] = json.loads(text)
        if self._described["model"]["type"] == "BPE":
            self._backend.model._resize_cache(_CACHED_WORDS)  # more words remembered: the same ids, a fifth faster
        special = {t["content"] for t in self._described["added_tokens"] if t["special"]} | set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or "(?!)")
        self._edges = tuple(dict.fromkeys(token[end] for token in special for end in (0, -1)))
        self._specials = "\0".join(special)
        unknown = tokenizer.unk_token_id
        self._unknown = -1 if unknown is None or unknown == tokenizer.eos_token_id else unknown

    def encode(self, texts: Sequence[Text]) -> list[Tokens]:
        """Token ids of each text, and where its spans lie among them."""
        job = self.plan(texts)
        return self.locate(job, self.run(job))

    def plan(self, texts: Sequence[Text]) -> Job:
        """What there is to tokenise; texts that spell special tokens are set apart."""
        guarded = tuple(index for index, text in enumerate(texts) if self.spells_special(text))
        if not guarded:
            return Job(tuple(texts))
        renamed = tuple(self._rename(texts[index], self._renamed[1]) for index in guarded)
        apart = set(guarded)
        return Job(tuple(text for index, text in enumerate(texts) if index not in apart), guarded, renamed)

    def run(self, job: Job) -> Encodings:
        """Tokenise; the only step that costs much, and the only one that does without Python's lock."""
        texts = [text.text for text in job.plain]
        encode = self._backend.encode_batch if self._byte_lengths is None else self._backend.encode_batch_fast
        plain = encode(texts, add_special_tokens=False) if texts else []
        if not job.renamed:
            return Encodings(plain, [])
        renamed = self._renamed[0].encode_batch([text.text for text in job.renamed], add_special_tokens=False)
        return Encodings(plain, renamed)

    def locate(self, job: Job, encoded: Encodings) -> list[Tokens]:
        """Find the spans among the tokens."""
        find = self._by_offsets if self._byte_lengths is None else self._by_lengths
        found = find(job.plain, encoded.plain)
        apart = dict(zip(job.guarded, self._by_offsets(job.renamed, encoded.renamed), strict=True))
        if not apart:
            return found
        rest = iter(found)
        count = len(job.plain) + len(apart)
        return [apart[i]._replace(guarded=True) if i in apart else next(rest) for i in range(count)]

    def spells_special(self, text: Text) -> bool:
        """Whether data in the text spell a special token, alone or together with what stands around them."""
        if not text.data or all(self._is_clear(text.text, start, end) for start, end in text.data):
            return False
        found = [match.span() for match in self._special.finditer(text.text)]
        return any(start < b and a < end for start, end in found for a, b in text.data)

    def _is_clear(self, text: str, start: int, end: int) -> bool:
        """Whether a range has no character that begins or ends a special token, and does not lie inside of one."""
        return text[start:end] not in self._specials and all(text.find(edge, start, end) < 0 for edge in self._edges)

    # ---- the common case

    def _by_lengths(self, texts: Sequence[Text], encoded: Sequence[Encoding]) -> list[Tokens]:
        """Spans by the bytes that each token stands for, all texts at once."""
        assert self._byte_lengths is not None
        lists = [encoding.ids for encoding in encoded]
        firsts = np.cumsum([0, *map(len, lists)])
        ids = np.fromiter(chain.from_iterable(lists), np.int32, int(firsts[-1]))
        starts = np.concatenate([[0], self._byte_lengths[ids].cumsum()])
        bases = starts[firsts].tolist()
        other: set[int] = set()
        positions: list[int] = []
        for index, text in enumerate(texts):
            bounds, total = _in_bytes(text)
            if total != bases[index + 1] - bases[index]:  # a normaliser changed the text, or a token swallowed blanks
                other.add(index)
            base = bases[index]
            positions += [base + bound for bound in bounds]
        cuts = np.searchsorted(starts[:-1], positions)
        joined = (starts[cuts] != positions).tolist()
        where, cuts_ = cuts.tolist(), 0
        made = []
        for index, (text, begin, end) in enumerate(zip(texts, firsts[:-1].tolist(), firsts[1:].tolist(), strict=True)):
            count = 2 * len(text.spans)
            own = [cut - begin for cut in where[cuts_ : cuts_ + count]]
            reaching = any(joined[cuts_ : cuts_ + count : 2])
            cuts_ += count
            if index in other:
                made += self._by_offsets([text], self._backend.encode_batch([text.text], add_special_tokens=False))
            else:
                made.append(Tokens(ids[begin:end], tuple(zip(own[::2], own[1::2], strict=True)), reaching))
        return made

    @cached_property
    def longest_token(self) -> float:
        """Characters that one token stands for at most; infinite where that cannot be told."""
        return math.inf if self._byte_lengths is None else float(self._byte_lengths.max())

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

    def _by_offsets(self, texts: Sequence[Text], encoded: Sequence[Encoding]) -> list[Tokens]:
        """Spans by the tokenizer's own offsets."""
        made = []
        for text, encoding in zip(texts, encoded, strict=True):
            ids = np.array(encoding.ids, dtype=np.int32)
            offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
            starts = np.append(offsets[:, 0], len(text.text))
            bounds = np.array(text.spans, dtype=np.int64).reshape(-1)
            cuts = np.searchsorted(starts[:-1], bounds)
            spans = tuple(zip(cuts[::2].tolist(), cuts[1::2].tolist(), strict=True))
            joined = bool((starts[cuts[::2]] != bounds[::2]).any())
            lost = bool((ids == self._unknown).any()) or _has_gap(text.text, offsets)
            made.append(Tokens(ids, spans, joined, lost=lost))
        return made

    # ---- text that spells special tokens

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


def _in_bytes(text: Text) -> tuple[Sequence[int], int]:
    """Bounds of the spans (start, end, start, end, ...) and the length of the text, in bytes."""
    plain, bounds = text.text, [position for span in text.spans for position in span]
    if plain.isascii():
        return bounds, len(plain)
    *inner, total = accumulate(len(plain[a:b].encode()) for a, b in pairwise((0, *bounds, len(plain))))
    return inner, total


def _has_gap(text: str, offsets: np.ndarray) -> bool:
    """Whether no token stands for some character that is no white space; ``offsets`` int64 ``[L, 2]``."""
    ends = np.maximum.accumulate(np.concatenate([[0], offsets[:, 1]]))
    starts = np.concatenate([offsets[:, 0], [len(text)]])
    return any(not text[ends[gap] : starts[gap]].isspace() for gap in np.flatnonzero(starts > ends))
