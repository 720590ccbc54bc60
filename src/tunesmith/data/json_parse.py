"""One JSON object of a row: fast where all is well, exact about what is wrong."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import orjson

from tunesmith.data import stream
from tunesmith.data.problem import RowProblem

MAX_DEPTH = 128
"""Deepest nesting of lists and objects in a row."""

_LARGE = 2.0**63
_SPACED_COLON = re.compile(rb'"[ \t\r\n]+:')
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*+"|(NaN|-?Infinity)', re.DOTALL)
_SPACE = " \t\r\n"


def parse_row(data: bytes) -> dict[str, Any]:
    """One JSON object.

    Raises:
        json.JSONDecodeError: broken JSON; ``pos`` counts characters.
        RowProblem: valid JSON or nearly so, but no row: ``not-utf8``, ``not-an-object``, ``duplicate-key``,
            ``nested-too-deeply``, ``not-a-number``.
    """
    try:
        value = orjson.loads(data)
        if type(value) is not dict:
            raise _not_an_object(value)
        keys = _count_keys(value, 1)
    except (orjson.JSONDecodeError, _DoubtfulNumber):
        return _parse_exactly(data)
    if data.count(b":") != keys and _may_repeat_keys(data, keys):
        return _parse_exactly(data)
    return value


class _DoubtfulNumber(Exception):
    """A number so large that the fast parser may have rounded an integer."""


def _count_keys(value: Any, depth: int) -> int:
    if depth > MAX_DEPTH:
        raise _nested_too_deeply()
    count, items = (len(value), value.values()) if type(value) is dict else (0, value)
    for item in items:
        kind = type(item)
        if kind is dict or kind is list:
            count += _count_keys(item, depth + 1)
        elif kind is float and not -_LARGE < item < _LARGE:
            raise _DoubtfulNumber
    return count


def _may_repeat_keys(data: bytes, keys: int) -> bool:
    """Whether the text may hold more keys than were kept. The fast parser keeps the last of equal keys, without a word."""
    if _SPACED_COLON.search(data):
        return True
    # Every key ends in a quote and a colon. A quote behind exactly one backslash is text, so it does not count.
    return data.count(b'":') - data.count(b'\\":') + data.count(b'\\\\":') != keys


def _parse_exactly(data: bytes) -> dict[str, Any]:
    text = stream.decode(data)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        if type(value) is not dict:
            raise _not_an_object(value)
        _count_keys(value, 1)
    except RecursionError:
        raise _nested_too_deeply() from None
    except _DoubtfulNumber:
        return value
    except json.JSONDecodeError:
        raise
    except RowProblem as problem:
        if problem.code == "not-a-number":
            problem.column = next((found.start() + 1 for found in _CONSTANT.finditer(text) if found[1]), None)
        raise
    except ValueError:
        raise RowProblem("not-a-number", "an integer of thousands of digits", "write it as a string", unreadable=True) from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        fix = "keep one of them"
        raise RowProblem("duplicate-key", f"the key {_shorten(twice)!r} stands twice in one object", fix, unreadable=True)
    return value


def _no_constant(name: str) -> NoReturn:
    raise RowProblem("not-a-number", f"{name} is not JSON", "write null, a number or a string", unreadable=True)


def _finite(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise RowProblem("not-a-number", "a number too large for a float", "write it as a string", unreadable=True)
    return value


def _not_an_object(value: Any) -> RowProblem:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    found = names.get(type(value), "null")
    fix = "write each row as an object of columns; a file that is one JSON array must end in .json"
    return RowProblem("not-an-object", f"expected an object of columns, found {found}", fix, unreadable=True)


def _nested_too_deeply() -> RowProblem:
    message = f"nested more than {MAX_DEPTH} levels deep"
    return RowProblem("nested-too-deeply", message, "flatten the row; no training row needs such depth", unreadable=True)


# ---- what to say


def explain(error: json.JSONDecodeError) -> str:
    """What is wrong, in plain words."""
    message, text, at = error.msg, error.doc, error.pos
    if message.startswith("Unterminated string"):
        return "unclosed string, or a line break inside one (write it as \\n)"
    if message.startswith("Invalid control character"):
        return "a line break or control character inside a string (write \\n, \\t or \\u0000 escapes)"
    if not text[at:].strip(_SPACE):
        return "the row ends too early: something is still open"
    if message.startswith("Invalid \\"):
        return "an escape that JSON does not have (write a backslash as \\\\)"
    if message.startswith("Extra data"):
        return "more text after the end of the row; one row a line is expected"
    if message.startswith("Expecting property name") or message.startswith("Illegal trailing comma"):
        return "expected a key in double quotes (no comma after the last one)"
    if message.startswith("Expecting ','"):
        return "expected a comma or a closing bracket"
    if message.startswith("Expecting ':'"):
        return "expected a colon after the key"
    if message.startswith("Expecting value"):
        return "expected a value: a string in double quotes, a number, true, false, null, a list or an object"
    return message


def near(error: json.JSONDecodeError) -> str:
    """A few characters around the place."""
    return repr(error.doc[max(error.pos - 24, 0) : error.pos + 24])


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
