"""The sandbox for chat templates, with operations that keep the memory of ``data/trace.py``.

An operation for which no such version exists is noticed when it is used on text that comes from somewhere, so that
its result is never taken for the template's own text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.runtime import Context, Macro

from tunesmith.data.sandbox import (
    MAX_SECONDS,
    ChatEnvironment,
    Generation,
    check_size,
    compile_with,
    take,
    to_json,
)
from tunesmith.data.trace import MARK, Span, TracedMarkup, TracedStr, as_text, escape, join, origins, texts_of


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> TracedStr:
    text = to_json(value, ensure_ascii, indent, separators, sort_keys)
    found = origins(value)
    if len(found) == 1:
        return TracedStr(text, [Span(0, len(text), found.pop(), -1)])
    spans: list[Span] = []
    position = 0
    for item in texts_of(value, sort_keys) if found else ():
        written = json.dumps(item, ensure_ascii=ensure_ascii)
        position = text.index(written, position)
        if isinstance(item, TracedStr) and item.spans:
            spans.append(Span(position + 1, position + len(written) - 1, item.spans[0].origin, -1))
        position += len(written)
    return TracedStr(text, [span for span in spans if span.start < span.end])


def _join_filter(value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> TracedStr:
    items = value if attribute is None else [item[attribute] for item in value]
    texts = [as_text(item) for item in items]
    check_size(sum(map(len, texts)) + len(d) * len(texts))
    return join(d, texts)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> TracedStr:
    """Jinja's ``indent``, piece by piece."""
    margin = width if isinstance(width, str) else " " * width
    lines = join("", [s, "\n"]).splitlines()
    if blank:
        return join("", [margin if first else "", join("\n" + margin, lines)])
    rest: list[str] = [join("", ["\n", margin, line]) if line else "\n" for line in lines[1:]]
    return join("", [margin if first else "", lines[0], *rest])


_FIELD = re.compile(r"(\{\d*\}|%s)")


def _fill(layout: str, values: Sequence[Any]) -> TracedStr | None:
    """``layout`` with its plain ``{}``, ``{0}`` or ``%s`` replaced; None if it asks for more than that."""
    pieces: list[Any] = _FIELD.split(layout)
    if any(mark in piece for piece in pieces[::2] for mark in "{}%"):
        return None
    counter = iter(range(len(pieces)))
    for index in range(1, len(pieces), 2):
        inner = pieces[index].strip("{}")
        place = int(inner) if inner.isdigit() else next(counter)
        if place >= len(values):
            return None
        pieces[index] = as_text(values[place])
    return join("", pieces)


_CHOOSING = ("attr", "d", "default", "first", "last", "max", "min", "random")
"""Filters that hand on one of the values that they are given."""


class _Marking(Generation):
    def mark(self, caller: Macro) -> TracedStr:
        text = join("", [caller()])
        whole = [Span(0, len(text), MARK, 0)] if text else []
        return TracedStr(text, [*whole, *text.spans])


class TracingEnvironment(ChatEnvironment):
    """The sandbox for chat templates, with operations that keep the trace.

    Attributes:
        lost: whether an operation made a text out of traced ones without saying where it came from.
    """

    generation: type[Extension] = _Marking
    concat = staticmethod(lambda parts: _concatenate(parts))

    def __init__(self, date: str | None = None) -> None:
        super().__init__(date)
        self.lost = False
        kept: dict[str, Callable[..., Any]] = {
            "tojson": _tojson,
            "join": _join_filter,
            "indent": _indent,
            "string": as_text,
            "safe": lambda value: TracedMarkup.made(as_text(value)),
            "escape": escape,
            "e": escape,
            "forceescape": lambda value: escape(join("", [as_text(value)])),
            "format": lambda value, *args: self._percent(value, args),
        }
        for name, function in {**self.filters, **kept}.items():
            self.filters[name] = function if name.startswith("_") or name in _CHOOSING else self._watched(function)
        self.finalize = self._finalize

    def _finalize(self, value: Any) -> Any:
        """What is written into the text."""
        return value if isinstance(value, str) else self._watch(as_text(value), value)

    def _watch(self, result: Any, *inputs: Any) -> Any:
        if isinstance(result, str) and result and not (isinstance(result, TracedStr) and result.spans):
            self.lost = self.lost or bool(origins(inputs))
        return result

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            return self._watch(function(*args, **kwargs), *args, *kwargs.values())

        return watched

    def _percent(self, layout: str, values: tuple[Any, ...]) -> str:
        return _fill(layout, values) or str(layout) % values

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*``, ``**`` and ``%``; see the base class."""
        result = super().call_binop(context, operator, left, right)
        if operator == "%" and isinstance(left, str):
            result = _fill(left, right if isinstance(right, tuple) else (right,)) or result
        if operator == "*" and isinstance(left, TracedStr) and isinstance(right, int):
            result = join("", [left] * right)
        return self._watch(result, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; see the base class."""
        result = super().call(__context, __obj, *args, **kwargs)
        owner = __obj.__self__ if isinstance(__obj, BuiltinMethodType | MethodType) else None
        if isinstance(__obj, Macro) or isinstance(owner, Mapping):
            return result
        return __self._watch(result, owner, *args, *kwargs.values())

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``format`` of a text that keeps the trace of what it fills in."""
        formatted = super().wrap_str_format(value)
        if formatted is None or value.__name__ != "format":
            return formatted

        def traced(*args: Any, **kwargs: Any) -> str:
            result = formatted(*args, **kwargs)
            return (None if kwargs else _fill(value.__self__, args)) or self._watch(result, *args, *kwargs.values())

        return traced


def _concatenate(parts: Iterable[Any]) -> TracedStr:
    texts = [as_text(part) for part in parts]
    check_size(sum(map(len, texts)))
    return join("", texts)


class TracedTemplate:
    """A compiled chat template that renders texts which know their origins.

    Args:
        source: the Jinja text.
        date: what ``strftime_now`` takes for today (ISO format); the real day if None.
        constants: variables that are the same in every rendering.

    Raises:
        jinja2.TemplateError: the text is no template.
    """

    def __init__(self, source: str, date: str | None, constants: Mapping[str, Any]) -> None:
        self._template = _compile(source, date)
        self._constants = {**self._template.globals, **constants}

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool
    ) -> tuple[TracedStr, bool]:
        """The text, and whether an operation lost the origin of some of it. Raises what Jinja raises, ``RenderLimit``."""
        environment = self._template.environment
        assert isinstance(environment, TracingEnvironment)
        variables = {
            **self._constants,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        environment.clock.start(MAX_SECONDS)
        environment.lost = False
        context = Context(environment, variables, None, self._template.blocks)
        text = join("", take(self._template.root_render_func(context), environment.clock))
        return text, environment.lost


@lru_cache(maxsize=256)
def _compile(source: str, date: str | None) -> jinja2.Template:
    return compile_with(TracingEnvironment(date), source)
