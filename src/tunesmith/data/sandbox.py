"""Jinja as transformers runs it for chat templates, in a sandbox with limits on size and time.

A template comes with a model and is not trusted: it can reach no Python internals, and it can neither fill the memory
nor run for long. Time is looked at in every pass of a loop and every call of a macro; size wherever text can grow:
at assignments, repetition, padding, replacement and joining, and in the output.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache, wraps
from itertools import islice
from types import BuiltinMethodType, MethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum, pass_context

MAX_CHARS = 16 << 20
"""Characters that a rendering, or any text on the way to it, may have."""
MAX_SECONDS = 10.0
"""Seconds that a rendering may take."""

_MAX_ITEMS = 1 << 18
_TICKS_PER_LOOK = 16
_PIECES_PER_LOOK = 4096
_WIDTH = re.compile(r"\d{8}")
_GROWING: tuple[type[nodes.Expr], ...] = (nodes.List, nodes.Tuple, nodes.Dict, nodes.Add, nodes.Call)
_SIZED_BY_NUMBER = ("batch", "center", "indent", "slice", "wordwrap")


class RenderLimit(jinja2.TemplateError):
    """The template makes too much text or takes too long."""


class Clock:
    """When a rendering must be done."""

    __slots__ = ("deadline", "ticks")

    def __init__(self) -> None:
        self.deadline = float("inf")
        self.ticks = 0

    def start(self, seconds: float) -> None:
        """Begin a rendering that may take so long."""
        self.deadline = time.monotonic() + seconds

    def look(self) -> None:
        """Raise RenderLimit when the time is up."""
        if time.monotonic() > self.deadline:
            raise RenderLimit(f"renders longer than {MAX_SECONDS:g} s")


def check_size(length: int) -> None:
    """Raise RenderLimit for a text of that many characters if that is too many."""
    if length > MAX_CHARS:
        raise RenderLimit(f"makes a text of more than {MAX_CHARS:,} characters")


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and value > MAX_CHARS:
            raise RenderLimit(f"asks for a text as long as {value:,} characters")
        if isinstance(value, tuple | list):
            _check_numbers(value)


def _count(value: Any, budget: int) -> int:
    """``budget`` less the items of nested lists and mappings, each counted as often as it would be written."""
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, list | tuple):
        items = value
    for item in items:
        budget = _count(item, budget - 1)
        if budget < 0:
            raise RenderLimit(f"makes a structure of more than {_MAX_ITEMS:,} items")
    return budget


def sized(value: Any) -> Any:
    """The value, unless it is too long. Raises RenderLimit."""
    if isinstance(value, str):
        check_size(len(value))
    elif isinstance(value, list | tuple | dict) and len(value) > _MAX_ITEMS:
        raise RenderLimit(f"makes a structure of more than {_MAX_ITEMS:,} items")
    return value


def _sized_deep(value: Any) -> Any:
    _count(value, _MAX_ITEMS)
    return sized(value)


def _concatenate(parts: Iterable[Any]) -> str:
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    check_size(sum(map(len, texts)))
    return "".join(texts)


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The ``tojson`` of chat templates: plain JSON, nothing escaped for HTML."""
    _count(value, _MAX_ITEMS)
    _check_numbers([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


class _TemplateDict:
    """``dict`` of a template: makes one, and offers nothing else of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """``namespace`` of a template, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may name a value self
        self, rest = args[0], args[1:]
        values = dict(*rest, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")


class Generation(Extension):
    """``{% generation %}...{% endgeneration %}``: encloses what the model says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the tag and what it encloses."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Macro) -> str:
        """The enclosed text."""
        return caller()


_OF_LOOPS = frozenset({"first", "last", "index", "index0", "revindex", "revindex0", "length", "previtem", "nextitem"})


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which transformers renders chat templates: same syntax, filters and globals; plus the limits.

    Args:
        date: what ``strftime_now`` takes for today (ISO format); the real day if None.
    """

    concat = staticmethod(_concatenate)
    generation: type[Extension] = Generation
    intercepted_binops = frozenset(("*", "**", "%"))

    def __init__(self, date: str | None = None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[self.generation, loopcontrols])
        self.clock = Clock()
        today = datetime.fromisoformat(date) if date else None
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda layout: (today or datetime.now()).strftime(layout)
        self.globals["dict"] = _TemplateDict()
        self.globals["namespace"] = _TemplateNamespace
        self.globals["lipsum"] = self._lorem_ipsum
        for name in _SIZED_BY_NUMBER:
            self.filters[name] = _number_checked(self.filters[name])
        for name in ("replace", "join"):
            self.filters[name] = _growth_checked(name, self.filters[name])
        self.filters["format"] = _format_filter
        self.filters["tojson"] = to_json
        self.filters["_sized"], self.filters["_sized_deep"] = sized, _sized_deep
        self.filters["_tick"] = self._ticking()

    def _lorem_ipsum(self, n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
        if n * max > _MAX_ITEMS:
            raise RenderLimit(f"asks for {n} paragraphs of {max} words")
        return generate_lorem_ipsum(n, html, min, max)

    def _ticking(self) -> Callable[..., None]:
        clock = self.clock

        @pass_context  # or the compiler would run it once and keep the result
        def tick(_context: Context, _: None) -> None:
            clock.ticks += 1
            if clock.ticks % _TICKS_PER_LOOK == 0:
                clock.look()

        return tick

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for block in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            tick = nodes.Filter(nodes.Const(None), "_tick", [], [], None, None)
            block.body.insert(0, nodes.ExprStmt(tick).set_lineno(block.lineno))  # type: ignore[attr-defined]
        for assign in list(tree.find_all(nodes.Assign)):
            deep = isinstance(assign.node, _GROWING) or any(True for _ in assign.node.find_all(_GROWING))
            assign.node = nodes.Filter(assign.node, "_sized_deep" if deep else "_sized", [], [], None, None)
            assign.node.set_lineno(assign.lineno)
        for captured in list(tree.find_all(nodes.AssignBlock)):
            captured.filter = nodes.Filter(captured.filter, "_sized", [], [], None, None)
            captured.filter.set_lineno(captured.lineno)
        return tree

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, as the sandbox allows; those of a loop, asked for in every turn of it, without looking twice."""
        if type(obj) is LoopContext and attribute in _OF_LOOPS:
            return getattr(obj, attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``*``, ``**`` and ``%``, refused where the result would be huge."""
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > 1 << 16:
            raise RenderLimit(f"computes {left} ** {right}")
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | list | tuple) and isinstance(times, int):
                    check_size(len(many) * times)
        if operator == "%" and isinstance(left, str):
            _check_format(left, [right])
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, as the sandbox allows, refused where the result would be huge."""
        if isinstance(__obj, BuiltinMethodType | MethodType) and isinstance(__obj.__self__, str):
            _check_method(__obj.__self__, __obj.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """The sandbox's ``format`` of a text, refused where the result would be huge."""
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__, [*args, *kwargs.values()])
            return formatted(*args, **kwargs)

        return checked


def _check_method(text: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if method == "replace" and len(args) >= 2 and isinstance(args[0], str) and isinstance(args[1], str):
        check_size(text.count(args[0]) * len(args[1]))
    elif method == "join" and args and isinstance(args[0], list | tuple):
        check_size(len(text) * len(args[0]) + sum(len(item) for item in args[0] if isinstance(item, str)))
    elif method == "translate":
        raise RenderLimit("calls translate on a text")
    elif method not in ("split", "rsplit", "find", "rfind", "index", "rindex", "count", "startswith", "endswith"):
        _check_numbers([*args, *kwargs.values()])


def _check_format(layout: str, values: Iterable[Any]) -> None:
    """Raise RenderLimit for a width that cannot be meant: eight digits, or given as such a number beside a ``*``."""
    if _WIDTH.search(layout):
        raise RenderLimit(f"formats with the layout {layout[:60]!r}")
    if "*" in layout or "{" in layout:
        _check_numbers(values)


def _number_checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_numbers([a for a in (*args, *kwargs.values()) if isinstance(a, int)])
        return function(*args, **kwargs)

    return checked


def _growth_checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``replace`` or ``join``, refused where its result would be huge."""

    @wraps(function)
    def checked(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "join":
            value = value if isinstance(value, str) else list(value)
            separator = args[0] if args else kwargs.get("d", "")
            lengths = sum(len(item) for item in value if isinstance(item, str))
            check_size(lengths + len(value) * (len(separator) if isinstance(separator, str) else 0))
        elif isinstance(value, str) and args:
            _check_method(value, name, args, kwargs)
        return function(context, value, *args, **kwargs)

    return checked


def _format_filter(value: str, *args: Any, **kwargs: Any) -> str:
    _check_format(value, [*args, *kwargs.values()])
    return str(value) % (kwargs or args)


class PlainTemplate:
    """A compiled chat template that renders plain texts, as fast as Jinja can.

    Args:
        source: the Jinja text.
        date: what ``strftime_now`` takes for today (ISO format); the real day if None.
        constants: variables that are the same in every rendering.

    Raises:
        jinja2.TemplateError: the text is no template.
    """

    def __init__(self, source: str, date: str | None, constants: Mapping[str, Any]) -> None:
        template = compile_plain(source, date)
        environment = template.environment
        assert isinstance(environment, ChatEnvironment)
        self._environment = environment
        self._root = template.root_render_func
        self._constants = {**template.globals, **constants}
        self._blocks = template.blocks

    def render(self, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        """Render. Raises what Jinja raises, and ``RenderLimit``."""
        variables = {
            **self._constants,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        self._environment.clock.start(MAX_SECONDS)
        pieces = self._root(Context(self._environment, variables, None, self._blocks))
        return "".join(take(pieces, self._environment.clock))


def take(pieces: Iterable[str], clock: Clock) -> list[str]:
    """All pieces of a rendering. Raises RenderLimit when they are too long, or come too slowly."""
    pieces = iter(pieces)
    taken: list[str] = []
    length = 0
    while more := list(islice(pieces, _PIECES_PER_LOOK)):
        length += sum(map(len, more))
        if length > MAX_CHARS:
            raise RenderLimit(f"renders more than {MAX_CHARS:,} characters")
        taken += more
        if len(more) < _PIECES_PER_LOOK:
            break
        clock.look()
    return taken


@lru_cache(maxsize=256)
def compile_plain(source: str, date: str | None) -> jinja2.Template:
    """Compile for plain texts. Raises jinja2.TemplateError."""
    return compile_with(ChatEnvironment(date), source)


def compile_with(environment: ChatEnvironment, source: str) -> jinja2.Template:
    """Compile in an environment; its ``concat`` also serves the ``~`` operator. Raises jinja2.TemplateError."""
    try:
        template = environment.from_string(source)
    except (RecursionError, MemoryError):  # the latter is how Python's own parser says the same
        raise jinja2.TemplateError("is nested too deeply") from None
    namespace = template.root_render_func.__globals__
    namespace["str_join"] = namespace["markup_join"] = environment.concat
    return template
