"""Shipped reward functions: numbers worked by hand, hostile texts, options that are refused before a run."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from tunesmith.config.policy import SHIPPED_REWARDS
from tunesmith.rewards import patterns
from tunesmith.rewards.math_answer import math_answer
from tunesmith.rewards.shipped import SHIPPED, option_problems, ready
from tunesmith.rewards.words import words_of


def scores(name: str, responses: list[str], references: list[str] | None = None, **options: Any) -> list[float]:
    assert not list(option_problems(name, options))
    function = ready(name, options, lambda text: len(text.split()))
    return function([""] * len(responses), responses, references or [""] * len(responses))


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("1000", ["It is 1,000.", "共１，０００元", r"\boxed{1000.0}", "so 10^3", "1e3", "0.1万", r"1{,}000", "1 \\times 10^{3}"], ["1001"]),
        ("1/2", ["0.5", r"\frac{1}{2}", "50%", r"so \boxed{\dfrac12}", "½", "2/4", r"x = \frac{1}{2}"], ["-1/2", "1/20", "1, 2"]),
        ("-3", ["x = -3", "答案是-3", "−3", "$-3$", "-$3"], ["5-3", "3"]),
        ("3 1/2", ["3½", r"3\frac{1}{2}", "3.5", "7/2"], ["3/2", "1/2"]),
        ("12 cm^2", ["12 cm²", r"\boxed{12\text{ cm}^2}", "12"], ["24", "122"]),
        ("50", ["50%"], ["0.5", "50.1"]),
        ("1/3", ["2/6"], ["0.333", "0.3333333333333333"]),
        ("5", ["the 5.", "5,", "1/0 or 5"], ["", "9" * 5000, "5/0", "x5", "A5", "5 or 6"]),
        ("Two and three, 2 + 3 = 5 eggs. She eats 1.\n#### 4", ["4", "#### 4", "#### $4.00\nbye", "#### Step 2\nso 4"], ["5", "4 #### 5"]),
        ("She takes 3 of them, and so 4 are left", ["4"], ["3"]),
        (r"3\sqrt{2}", [r"\boxed{3 \sqrt{2}}"], [r"\boxed{5\sqrt{2}}", "2"]),
        ("(1, 2)", [r"\boxed{(1,2)}"], [r"\boxed{(2,1)}", "2"]),
        ("B", ["The answer is B.", "(b)", r"\boxed{\text{B}}", "答案：B"], ["A", "B or A", ""]),
        ("72", ["<answer>72</answer> and 5", r"\boxed{71} no, \boxed{72}"], [r"72 \boxed{71}", r"\boxed{7 or 72}"]),
    ],
)  # fmt: skip
def test_math_answer(reference: str, right: list[str], wrong: list[str]) -> None:
    given = [*right, *wrong]
    found = math_answer([""] * len(given), given, [reference] * len(given))
    assert dict(zip(given, found, strict=True)) == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)


def test_no_text_takes_math_answer_long() -> None:
    began = time.perf_counter()
    hostile = [
        "1" * 20_000,
        "1 " * 10_000,
        r"\boxed{" * 5_000,
        "<answer>" * 5_000,
        r"\frac{" * 5_000,
        "9^999" * 200,
        "answer " * 5_000,
    ]
    assert math_answer([""] * 7, hostile, ["3"] * 7) == [0.0] * 7
    assert time.perf_counter() - began < 5


def test_format() -> None:
    good = "<think>2 and 2\nmake 4</think>\n<answer>4</answer>\n"
    bad = [
        "4",
        good + "x",
        good + good,
        "<think>a</think><answer>b",
        "<answer>b</answer><think>a</think>",
        "<think><think>a</think><answer>b</answer>",
    ]
    assert scores("format", [good, *bad]) == [1.0] + [0.0] * len(bad)
    assert scores("format", ["ab", "abc"], pattern="a.") == [1.0, 0.0]


def test_regex(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scores("regex", ["xay", "a", "b"], pattern="a", reward=-0.5) == [-0.5, -0.5, 0.0]
    assert scores("regex", ["xay", "a"], pattern="a", full=True) == [0.0, 1.0]
    monkeypatch.setattr(patterns, "LONGEST_SEARCH", 0.05)
    assert scores("regex", ["a" * 5000, "aab"], pattern="(a+)+b") == [0.0, 1.0]
    assert "takes longer than 0.05 s on 1 of 2 answers" in caplog.text


def test_length() -> None:
    said = ["你好 new world", "one", ""]  # 4, 1 and 0 words
    assert scores("length", said, target=4) == [1.0, 0.25, 0.0]
    assert scores("length", said, target=3, tolerance=2) == [0.5, 0.0, 0.0]
    assert scores("length", [" abc "], target=4, unit="chars") == [0.75]
    assert scores("length", ["a-b c"], target=2, unit="tokens") == [1.0]
    assert words_of("Don't stop, 你好!") == ["Don't", "stop", "你", "好"]


def test_repetition() -> None:
    assert scores("repetition", ["a b A b a", "", "a"], size=2) == [-0.5, 0.0, 0.0]
    assert scores("repetition", ["好好好好"]) == [-0.5]


def test_reference() -> None:
    assert scores("reference", [" Ｔｈｅ  cat. ", "a cat"], ["the cat", "the cat"]) == [1.0, 0.0]
    assert scores("reference", ["the cat sat", "", "你们好"], ["the cat", "x", "你好"], measure="f1") == [0.8, 0.0, 0.8]
    # of "ab" in "abc": P = (1 + 1) / 2, R = (2/3 + 1/2) / 2 = 7/12, F = 5 P R / (4 P + R) = 35/55
    assert scores("reference", ["ab", "ab", "x"], ["abc", "ab", "ab"], measure="chrf") == pytest.approx([35 / 55, 1.0, 0.0])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("length", {}, r"\{length: \{target: \.\.\.\}\}: is needed and not given"),
        ("length", {"target": "5"}, "target.*valid integer; found '5'"),
        ("length", {"target": 0}, "greater than 0; found 0"),
        ("length", {"target": 5, "unit": "bytes"}, "'chars', 'words' or 'tokens'; found 'bytes'"),
        ("length", {"target": 5, "count_tokens": 1}, "count_tokens.*no such option; length takes target, tolerance, unit"),
        ("regex", {"pattern": "("}, "is no regular expression: missing"),
        ("regex", {"pattern": "a", "reward": float("nan")}, "finite number"),
        ("math_answer", {"exact": True}, "no such option; math_answer takes none"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Any], words: str) -> None:
    (found,) = option_problems(name, options)
    assert re.search(words, found), found


def test_the_names_are_those_of_the_settings() -> None:
    assert tuple(SHIPPED) == SHIPPED_REWARDS
