"""Strings that remember where their characters come from.

A chat template is rendered with message texts as ``TracedStr``. Whatever the template does with them (slicing,
trimming, splitting, joining, macros, ``~``, ``+``), the characters of the result that come from a message still say
so. That is how a loss mask is derived for any template without marks in it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, SupportsIndex

import markupsafe

MARK = -1
"""Origin of text inside ``{% generation %}``."""
TOOLS = -2
"""Origin of the descriptions of tools."""


class Span(NamedTuple):
    """Characters ``start:end`` of a string come from ``origin``, beginning at character ``offset`` there.

    ``offset`` is -1 where the text was rewritten on its way (serialised as JSON).
    """

    start: int
    end: int
    origin: int
    offset: int


class TracedStr(str):
    """A string with the spans that it took over from other strings. Equal, hashed and printed as the plain one."""

    __slots__ = ("spans",)
    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Iterable[Span] = ()) -> TracedStr:
        self = super().__new__(cls, text)
        self.spans = tuple(spans)
        return self

    @classmethod
    def of(cls, text: str, origin: int) -> TracedStr:
        """``text`` as the whole content of ``origin``."""
        return cls(text, [Span(0, len(text), origin, 0)] if text else [])

    def __str__(self) -> TracedStr:
        return self

    def _cut(self, start: int, end: int) -> TracedStr:
        kept = []
        for span in self.spans:
            low, high = max(span.start, start), min(span.end, end)
            if low < high:
                offset = span.offset + low - span.start if span.offset >= 0 else -1
                kept.append(Span(low - start, high - start, span.origin, offset))
        return TracedStr(str.__getitem__(self, slice(start, end)), kept)

    def __getitem__(self, key: SupportsIndex | slice) -> TracedStr:
        if isinstance(key, slice):
            start, end, step = key.indices(len(self))
            if step != 1:
                return join("", [self._cut(i, i + 1) for i in range(start, end, step)])
            return self._cut(start, max(start, end))
        index = operator.index(key)  # a text key must raise TypeError, as Jinja expects
        index += len(self) if index < 0 else 0
        str.__getitem__(self, index)  # raises IndexError as a plain string does
        return self._cut(index, index + 1)

    def __iter__(self) -> Iterator[TracedStr]:
        return (self._cut(i, i + 1) for i in range(len(self)))

    def __add__(self, other: str) -> TracedStr:
        return join("", (self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TracedStr:
        return join("", (other, self)) if isinstance(other, str) else NotImplemented

    def strip(self, chars: str | None = None, /) -> TracedStr:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TracedStr:
        return self._cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> TracedStr:
        return self._cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> TracedStr:
        return self._cut(len(prefix), len(self)) if str.startswith(self, prefix) else self

    def removesuffix(self, suffix: str, /) -> TracedStr:
        return self._cut(0, len(self) - len(suffix)) if suffix and str.endswith(self, suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TracedStr]:  # type: ignore[override]
        return self._locate(str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TracedStr]:  # type: ignore[override]
        return self._locate(str.rsplit(self, sep, maxsplit))

    def splitlines(self, keepends: bool = False) -> list[TracedStr]:  # type: ignore[override]
        return self._locate(str.splitlines(self, keepends))

    def partition(self, sep: str, /) -> tuple[TracedStr, TracedStr, TracedStr]:
        return tuple(self._locate(str.partition(self, sep)))  # type: ignore[return-value]

    def rpartition(self, sep: str, /) -> tuple[TracedStr, TracedStr, TracedStr]:
        return tuple(self._locate(str.rpartition(self, sep)))  # type: ignore[return-value]

    def _locate(self, pieces: Iterable[str]) -> list[TracedStr]:
        """Cut out pieces that stand in this string in this order."""
        found, position = [], 0
        for piece in pieces:
            position = str.find(self, piece, position)
            found.append(self._cut(position, position + len(piece)))
            position += len(piece)
        return found

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TracedStr:
        limit = count.__index__()
        if not old:
            return TracedStr(str.replace(self, old, new, limit))
        return join(new, self._locate(str.split(self, old, limit)))

    def join(self, parts: Iterable[str], /) -> TracedStr:
        return join(self, parts)

    def _same_length(self, changed: str) -> TracedStr:
        return TracedStr(changed, self.spans if len(changed) == len(self) else ())

    def upper(self) -> TracedStr:
        return self._same_length(str.upper(self))

    def lower(self) -> TracedStr:
        return self._same_length(str.lower(self))

    def title(self) -> TracedStr:
        return self._same_length(str.title(self))

    def capitalize(self) -> TracedStr:
        return self._same_length(str.capitalize(self))


def join(separator: str, parts: Iterable[str]) -> TracedStr:
    """``separator.join(parts)`` that keeps the spans of all of them; touching runs of one origin are merged."""
    pieces: list[str] = []
    for part in parts:
        if pieces and separator:
            pieces.append(separator)
        pieces.append(part)
    spans: list[Span] = []
    position = 0
    for piece in pieces:
        if isinstance(piece, TracedStr):
            for span in piece.spans:
                _append(spans, Span(span.start + position, span.end + position, span.origin, span.offset))
        position += len(piece)
    return TracedStr("".join(pieces), spans)


def _append(spans: list[Span], new: Span) -> None:
    last = spans[-1] if spans else None
    touching = last is not None and last.end == new.start and last.origin == new.origin
    if last and touching and min(last.offset, new.offset) >= 0 and last.offset + last.end - last.start == new.offset:
        spans[-1] = last._replace(end=new.end)
        return
    spans.append(new)


class TracedMarkup(TracedStr):
    """Text that ``safe`` or ``escape`` made; what is added to it is escaped, as ``markupsafe`` does it."""

    __slots__ = ()

    def __html__(self) -> TracedMarkup:
        return self

    def __add__(self, other: str) -> TracedMarkup:
        return TracedMarkup.made(join("", (self, escape(other)))) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TracedMarkup:
        return TracedMarkup.made(join("", (escape(other), self))) if isinstance(other, str) else NotImplemented

    @classmethod
    def made(cls, text: str) -> TracedMarkup:
        """A text as markup."""
        return cls(str.__str__(text), text.spans if isinstance(text, TracedStr) else ())


_ENTITIES = {"&": "&amp;", ">": "&gt;", "<": "&lt;", "'": "&#39;", '"': "&#34;"}


def escape(value: Any) -> TracedMarkup:
    """``markupsafe.escape`` that keeps the trace."""
    text = as_text(value)
    if isinstance(text, TracedMarkup):
        return text
    if not isinstance(text, TracedStr):
        return TracedMarkup.made(str(markupsafe.escape(text)))
    pieces = []
    for piece in text:
        entity = _ENTITIES.get(str.__str__(piece))
        spans = piece.spans[0] if piece.spans else None
        if entity and spans:
            pieces.append(TracedStr(entity, [Span(0, len(entity), spans.origin, -1)]))
        else:
            pieces.append(TracedStr(entity) if entity else piece)
    return TracedMarkup.made(join("", pieces))


def trace(value: Any, origin: int) -> Any:
    """A copy of plain data in which every text, also a key, comes from ``origin``."""
    if isinstance(value, str):
        return TracedStr.of(value, origin)
    if isinstance(value, Mapping):
        return {trace(key, origin): trace(item, origin) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace(item, origin) for item in value]
    return value


def origins(value: Any) -> set[int]:
    """All origins found in plain data."""
    return {span.origin for text in texts_of(value) if isinstance(text, TracedStr) for span in text.spans}


def texts_of(value: Any, sort_keys: bool = False) -> Iterator[str]:
    """All texts of plain data, in the order in which JSON writes them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key in sorted(value) if sort_keys else value:
            yield from texts_of(key)
            yield from texts_of(value[key], sort_keys)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item, sort_keys)


def as_text(value: Any) -> str:
    """``str(value)``; where all text in a list or mapping is of one origin, so is what Python writes for it."""
    if isinstance(value, str):
        return value
    text, found = str(value), origins(value)
    return TracedStr(text, [Span(0, len(text), found.pop(), -1)]) if len(found) == 1 else text
