"""What a mask has to be, found with transformers alone: renderings, its own marks, and the bytes of tokens.

Nothing here uses the code that makes masks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils.chat_template_utils import render_jinja_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]


class Library:
    """One conversation as transformers renders it; each beginning of it once.

    Args:
        tokenizer: whose special tokens the template sees.
        source: the chat template.
        messages: in the form that the template takes.
        tools: the same.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: str, messages: list[dict[str, Any]], tools: list[Any] | None
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._messages = messages
        self._tools = tools
        self._known: dict[tuple[int, bool], str | None] = {}

    def text(self, count: int, ask: bool = False) -> str | None:
        """The first ``count`` messages, asking for a reply or not; None where the template refuses them."""
        key = (count, ask)
        if key not in self._known:
            try:
                rendered = self._tokenizer.apply_chat_template(
                    self._messages[:count],
                    tools=self._tools,
                    chat_template=self._source,
                    add_generation_prompt=ask,
                    tokenize=False,
                )
                self._known[key] = str(rendered)
            except Exception:  # templates raise anything, and there is one question only: does it render
                self._known[key] = None
        return self._known[key]

    def marks(self, count: int) -> list[Span]:
        """Character ranges that the template marks, as transformers finds them; those that touch are one."""
        _, marked = render_jinja_template(
            conversations=[self._messages[:count]],
            tools=self._tools,
            chat_template=self._source,
            return_assistant_tokens_mask=True,
            **self._tokenizer.special_tokens_map,
        )
        ranges: list[Span] = []
        for start, end in sorted(marked[0]):
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
            elif end > start:
                ranges.append((start, end))
        return ranges


class TokenBytes:
    """The bytes that each token stands for, read off its name.

    Args:
        tokenizer: byte-level, or with blanks written as U+2581 and bytes as ``<0x0A>``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._bytes = {character: byte for byte, character in bytes_to_unicode().items()}
        self._byte_level = '"ByteLevel"' in tokenizer.backend_tokenizer.to_str()
        self._added = {i: self._plain(token.content).encode() for i, token in tokenizer.added_tokens_decoder.items()}
        self._blank_first = self._adds_blank("")
        self._blank_later = bool(self._added) and self._adds_blank(next(iter(tokenizer.added_tokens_decoder.values())).content)

    def of(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token."""
        names = self._tokenizer.convert_ids_to_tokens(list(ids))
        return [self._added.get(index) or self._of_name(name) for index, name in zip(ids, names, strict=True)]

    def _of_name(self, name: str) -> bytes:
        if self._byte_level:
            return bytes(self._bytes[character] for character in name)
        if name.startswith("<0x") and len(name) == 6:
            return bytes([int(name[3:5], 16)])
        return self._plain(name).encode()

    def _plain(self, text: str) -> str:
        """The text as far as the tokenizer tells characters apart: U+2581 in it may be a blank like any other."""
        return text if self._byte_level else text.replace("\u2581", " ")

    def _adds_blank(self, before: str) -> bool:
        """Whether the tokenizer puts a blank of its own before a text that follows ``before``."""
        ids = self._tokenizer.encode(f"{before}a", add_special_tokens=False)
        return b"".join(self.of(ids)) == f"{before} a".encode()

    def _pieces(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token, without the blanks that the tokenizer puts in front and behind added tokens."""
        pieces = self.of(ids)
        for place, piece in enumerate(pieces):
            own = self._blank_later if place and ids[place - 1] in self._added else self._blank_first and not place
            if own and ids[place] not in self._added:
                pieces[place] = piece.removeprefix(b" ")
        return pieces

    def starts(self, text: str, ids: Sequence[int]) -> list[int] | None:
        """The character in which each token begins, and the length; None if the tokens do not spell the text."""
        pieces = self._pieces(ids)
        wanted = self._plain(text)
        if b"".join(pieces) != wanted.encode():
            return None
        ends = list(accumulate(len(character.encode()) for character in wanted))
        return [bisect_left(ends, position + 1) for position in accumulate(map(len, pieces), initial=0)]


def occurrences(text: str, word: str) -> list[Span]:
    """Where a word stands."""
    found, position = [], text.find(word)
    while position >= 0:
        found.append((position, position + len(word)))
        position = text.find(word, position + len(word))
    return found
