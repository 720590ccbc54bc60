"""Strings that remember where their characters come from, and a Jinja environment that keeps the memory.

A chat template is rendered with message texts as ``TracedStr``. Whatever the template does with them (slicing,
trimming, splitting, joining, macros, ``~``, ``+``), the characters of the result that come from a message still say
so. That is how a loss mask is derived for any template without marks in it.
"""

from __future__ import annotations

import json
import operator
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, SupportsIndex

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MARK = -1
"""Origin of text inside ``{% generation %}``."""


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


def trace(value: Any, origin: int) -> Any:
    """A copy of plain data in which every text (not the keys) comes from ``origin``."""
    if isinstance(value, str):
        return TracedStr.of(value, origin)
    if isinstance(value, dict):
        return {key: trace(item, origin) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [trace(item, origin) for item in value]
    return value


def origins(value: Any) -> set[int]:
    """All origins found in plain data."""
    if isinstance(value, TracedStr):
        return {span.origin for span in value.spans}
    if isinstance(value, dict):
        return set().union(*(origins(item) for pair in value.items() for item in pair), set())
    if isinstance(value, list | tuple):
        return set().union(*(origins(item) for item in value), set())
    return set()


class RenderLimit(jinja2.TemplateError):
    """The template produces too much text or takes too long."""


class _Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: what it encloses is marked."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Macro) -> TracedStr:
        text = join("", [caller()])
        whole = [Span(0, len(text), MARK, 0)] if text else []
        return TracedStr(text, [*whole, *text.spans])


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> TracedStr:
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    found = origins(value)
    return TracedStr(text, [Span(0, len(text), found.pop(), -1)] if len(found) == 1 else ())


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> TracedStr:
    items = value if attribute is None else [item[attribute] for item in value]
    return join(d, [item if isinstance(item, str) else str(item) for item in items])


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _concatenate(parts: Iterable[Any]) -> TracedStr:
    return join("", [part if isinstance(part, str) else str(part) for part in parts])


class TracingEnvironment(ImmutableSandboxedEnvironment):
    """Transformers' template sandbox, with operations that keep the trace."""

    concat = staticmethod(_concatenate)

    def __init__(self, date: str | None = None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters["join"] = _join_filter
        self.filters["safe"] = lambda value: value
        self.globals["raise_exception"] = _raise
        today = datetime.fromisoformat(date) if date else None
        self.globals["strftime_now"] = lambda layout: (today or datetime.now()).strftime(layout)


class TracedTemplate:
    """A compiled chat template.

    Args:
        source: the Jinja text.
        date: what ``strftime_now`` takes for today (ISO format); the real day if None.
        max_chars: refuse to render more than that.
        max_seconds: stop rendering after that.
    """

    def __init__(self, source: str, date: str | None = None, max_chars: int = 16 << 20, max_seconds: float = 10.0) -> None:
        self.source = source
        self.max_chars = max_chars
        self.max_seconds = max_seconds
        self._template = _compile(source, date)

    def render(self, **variables: Any) -> TracedStr:
        """Render. Raises what Jinja raises, and ``RenderLimit``."""
        template = self._template
        deadline = time.monotonic() + self.max_seconds
        pieces: list[str] = []
        length = 0
        for piece in template.root_render_func(template.new_context(variables)):
            pieces.append(piece)
            length += len(piece)
            if length > self.max_chars:
                raise RenderLimit(f"renders more than {self.max_chars:,} characters")
            if time.monotonic() > deadline:
                raise RenderLimit(f"renders longer than {self.max_seconds:g} s")
        return join("", pieces)


@lru_cache(maxsize=256)
def _compile(source: str, date: str | None) -> jinja2.Template:
    template = TracingEnvironment(date).from_string(source)
    namespace = template.root_render_func.__globals__
    namespace["str_join"] = _concatenate  # the ~ operator
    namespace["markup_join"] = _concatenate
    return template
