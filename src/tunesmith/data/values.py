"""Single values of a raw row -> text, JSON and weights, each checked."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from tunesmith.data.problem import RowProblem

_MAX_DEPTH = 64
_SHOWN_NAME = 40
_TYPE_NAMES: dict[type, str] = {
    dict: "an object", list: "a list", tuple: "a list", int: "a number", float: "a number", bool: "true/false",
    str: "text", type(None): "null", bytes: "bytes",
}  # fmt: skip


def type_name(value: Any) -> str:
    """What a value is, in the words of JSON."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def shown(name: str) -> str:
    """A name from the data, quoted and short enough for a message."""
    return repr(name if len(name) <= _SHOWN_NAME else name[: _SHOWN_NAME - 3] + "...")


def text(value: Any, kind: str, name: str | int) -> str:
    """A text that a tokenizer takes; null is the empty text.

    Args:
        value: as read.
        kind: what holds it, e.g. ``column`` or ``turn``.
        name: which one: a column's name or a turn's number.

    Raises:
        RowProblem: ``not-text``, ``nul-character`` or ``lone-surrogate``.
    """
    if isinstance(value, str):
        if "\0" in value:
            raise RowProblem("nul-character", f"{kind} {name!r} holds a NUL character", "Remove the character.")
        if not value.isascii():
            _check_surrogates(value, kind, name)
        return value
    if value is None:
        return ""
    raise RowProblem("not-text", f"{kind} {name!r} is {type_name(value)}, expected text", "Write it as text, in quotes.")


def _check_surrogates(value: str, kind: str, name: str | int) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowProblem(
            "lone-surrogate",
            f"{kind} {name!r} holds half of a surrogate pair, which is no character",
            "Remove the escape between \\ud800 and \\udfff, or complete the pair.",
        ) from None


def verdict(value: Any) -> bool | None:
    """What a label of good or bad says: true or false, 1 or 0, also as text, as in CSV files; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def number(value: Any, name: str) -> float:
    """A finite number, also as text, as in CSV files. Raises RowProblem ``not-a-number``."""
    found = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
    if math.isfinite(found):
        return found
    what = repr(value)[:_SHOWN_NAME] if isinstance(value, (str, float)) else type_name(value)
    raise RowProblem("not-a-number", f"column {name!r} is {what}, expected a finite number", "Write a number.")


def parse_json(value: str, what: str, code: str) -> Any:
    """The value that a JSON text spells. Raises RowProblem ``code`` when it spells none."""
    try:
        return json.loads(value, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = str(error)
    raise RowProblem(code, f"{what} is no JSON: {reason}", "Write it as valid JSON, with double quotes.")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def check_json(value: Any, what: str, code: str) -> None:
    """Check that a value is JSON all the way down, and its texts are clean.

    Raises:
        RowProblem: ``code`` for what JSON cannot say or what is nested too deeply; else as ``text`` does.
    """
    level = [value]
    for _ in range(_MAX_DEPTH):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                if not all(isinstance(key, str) for key in item):
                    raise RowProblem(code, f"{what} holds an object with a key that is no text", "Use texts as keys.")
                inner.extend(item)
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
            elif isinstance(item, str):
                text(item, "a text in", what)
            elif isinstance(item, float) and not math.isfinite(item):
                raise RowProblem(code, f"{what} holds a number that is not finite", "Write a finite number or null.")
            elif item is not None and not isinstance(item, (int, float)):
                raise RowProblem(code, f"{what} holds {type_name(item)}, which JSON has not", "Write it as text.")
        if not inner:
            return
        level = inner
    raise RowProblem(code, f"{what} is nested more than {_MAX_DEPTH} deep", "Flatten it.")


def weight(value: Any, kind: str, number: int, key: str) -> float:
    """Factor of a turn's loss: true, false, or a number from 0 on. Raises RowProblem ``bad-weight``."""
    if isinstance(value, (bool, int, float)):
        try:
            factor = float(value)
        except OverflowError:
            factor = math.inf
        if factor >= 0 and math.isfinite(factor):
            return factor
        found = "a number that is negative or not finite"
    else:
        found = type_name(value)
    raise RowProblem(
        "bad-weight",
        f"{key!r} of {kind} {number} is {found}, expected true, false or a number from 0 on",
        "Write true, false or a number from 0 on.",
    )
