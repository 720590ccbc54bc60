r"""``math_answer``: whether the answer to a problem is the number that the data give, compared exactly.

The answer of a text is what it marks as such: the last ``\boxed{...}``, else what stands behind the last ``####``, else the
last ``<answer>...</answer>``; where nothing is marked, its last number. Numbers are fractions of whole numbers, never floats.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from tunesmith.rewards.words import plain, words_of

_MOST_DIGITS = 200
"""Of a number; longer rows of digits are none."""
_FEW_WORDS = 4
"""A text with more words is a solution, of which the last number counts; others are answers, compared whole."""
_NUMBER = re.compile(
    r"""
    (?: (?<![A-Za-z0-9_)\]}.%]) (?P<sign>[-+]) \s? [$¥€£]? | (?<![A-Za-z_^.\d]) )
    (?:
        (?P<whole>\d+) \s+ (?P<over>\d+) \s?/\s? (?P<under>\d+)
      | (?P<above>\d+) \s?/\s? (?P<below>\d+)
      | (?P<decimal> \d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+ )
        (?: (?:\^|\*\*) \{? (?P<power>[-+]?\d{1,3}) \}?
          | [eE] (?P<exponent>[-+]?\d{1,3}) (?![\dA-Za-z])
          | \s? (?:\\times|\\cdot|[×·*x]) \s? 10 \s? (?:\^|\*\*) \s? \{? (?P<ten>[-+]?\d{1,3}) \}? )?
    )
    (?: \s? (?P<percent>%) | \s? (?P<many>[万亿]) )?
    """,
    re.VERBOSE,
)
_MANY = {"万": 10**4, "亿": 10**8}
_SUPERSCRIPTS = re.compile("[⁰¹²³⁴-⁹]+")
_VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))")
_SPACING = re.compile(r"\\[,!;: ]|\{,\}(?=\d)|\\left|\\right|\\displaystyle|[$]")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}")
_ANSWER = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)
_SAID = re.compile(r"(?:answer\s*(?:is|:)|答案\s*(?:是|为|:))\s*:?\s*([^\n]*)", re.IGNORECASE)
_OTHER_THAN_UNITS = re.compile(r"\\(?!circ\b|deg|%|\$)[A-Za-z]+|[α-ωΑ-Ω√]|(?<![A-Za-z])[xyznkabc](?![A-Za-z])|[=<>+*^]\s*$")


class Number(NamedTuple):
    """A number, and whether a percent sign stands behind it; the value is that without the sign."""

    value: Fraction
    percent: bool = False

    def same(self, other: Number) -> bool:
        """Equal; where one of the two has a percent sign, it may be a unit, or mean hundredths."""
        ours, theirs = self._hundredths(), other._hundredths()
        return ours == theirs or (self.percent != other.percent and self.value == other.value)

    def _hundredths(self) -> Fraction:
        return self.value / 100 if self.percent else self.value


def math_answer(prompts: Sequence[str], responses: Sequence[str], references: Sequence[str]) -> list[float]:
    r"""1 for each response whose answer is that of its reference, else 0.

    Numbers are equal when their values are: ``1,000``, ``1000.0`` and ``１０００``; ``1/2``, ``0.5``, ``\frac{1}{2}`` and
    ``50%``; ``3 cm^2`` and ``3``. ``0.333`` is not ``1/3``. Answers that are not one number (``3\sqrt{2}``, ``(1, 2)``, ``B``)
    are compared as texts without white space, case and brackets around them.

    Args:
        prompts: not looked at.
        responses: what is judged.
        references: the answers, alone or at the end of a solution.
    """
    return [float(_right(response, reference)) for response, reference in zip(responses, references, strict=True)]


def _right(response: str, reference: str) -> bool:
    wanted, given = _levelled(reference), _levelled(response)
    marked = _marked(wanted)
    expected = wanted if marked is None else marked
    number = _number(expected)
    stated = _marked(given)
    if number is None:
        if stated is None:
            said = _SAID.findall(given)
            stated = said[-1] if said else (given.strip().splitlines() or [""])[-1]
        return bool(_bare(expected)) and _bare(stated) == _bare(expected)
    found = _last_number(given) if stated is None else _number(stated)
    return found is not None and found.same(number)


# ---- where the answer stands


def _marked(text: str) -> str | None:
    """What a text marks as its answer."""
    if (boxed := _last_box(text)) is not None:
        return boxed
    if "####" in text:
        line, _, rest = text.rpartition("####")[2].strip().partition("\n")
        if not rest.strip() or _NUMBER.match(line):  # else it is a heading
            return line
    found = _ANSWER.findall(text)
    return found[-1].strip() if found else None


def _last_box(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds; None where there is none that is closed."""
    start = text.rfind("\\boxed")
    begin = text.find("{", start)
    if start < 0 or begin < 0 or text[start + len("\\boxed") : begin].strip():
        return None
    depth = 0
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return None


# ---- numbers


def _number(text: str) -> Number | None:
    """The number of an answer, or the last one of a solution."""
    found = _only_number(text)
    return _last_number(text) if found is None and len(words_of(text)) > _FEW_WORDS else found


def _only_number(text: str) -> Number | None:
    """The number of a text that is one number, with a unit or a name (``x =``) at most."""
    text = text.rpartition("=")[2] if "=" in text else text
    found = list(_NUMBER.finditer(text))
    if len(found) != 1:
        return None
    rest = text[: found[0].start()] + " " + text[found[0].end() :]
    return None if _OTHER_THAN_UNITS.search(rest) else _value(found[0])


def _last_number(text: str) -> Number | None:
    for found in reversed(list(_NUMBER.finditer(text))):
        if (number := _value(found)) is not None:
            return number
    return None


def _value(found: re.Match[str]) -> Number | None:
    """None for a division by zero, and for rows of digits that nobody means as a number."""
    parts = found.groupdict()
    if any(part and len(part) > _MOST_DIGITS for part in parts.values()):
        return None
    try:
        if parts["whole"]:
            value = int(parts["whole"]) + Fraction(int(parts["over"]), int(parts["under"]))
        elif parts["above"]:
            value = Fraction(int(parts["above"]), int(parts["below"]))
        else:
            value = Fraction(parts["decimal"].replace(",", ""))
            if parts["power"]:
                value **= int(parts["power"])
            value *= Fraction(10) ** int(parts["exponent"] or parts["ten"] or 0)
    except ZeroDivisionError:
        return None
    value *= _MANY.get(parts["many"] or "", 1)
    return Number(-value if parts["sign"] == "-" else value, bool(parts["percent"]))


# ---- texts


def _levelled(text: str) -> str:
    """One way to write digits, signs, fractions and powers; what LaTeX says of spacing and fonts is left out."""
    text = _SUPERSCRIPTS.sub(lambda found: "^" + found.group(), text)
    text = unicodedata.normalize("NFKC", _VULGAR.sub(" ", text)).replace("⁄", "/").replace("−", "-").replace("\\%", "%")
    text = _WRAPPED.sub(r" \1", _SPACING.sub("", text))
    return _FRACTION.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", text)


def _bare(text: str) -> str:
    """A text to compare with: no white space, no case, no brackets or punctuation around it."""
    return "".join(plain(text).split()).strip("()[]{}*.,:;")
