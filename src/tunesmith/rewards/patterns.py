"""``format`` and ``regex``: whether an answer has a structure that a regular expression describes.

Patterns are those of the package ``regex`` (a superset of Python's), because it takes a time limit: a pattern that backtracks
without end on some answer would otherwise stop the run there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Annotated

import regex
from pydantic import AfterValidator

log = logging.getLogger(__name__)

LONGEST_SEARCH = 0.5
"""Seconds for one answer."""
THINK_ANSWER = r"\s*<think>(?:(?!</?think>|</?answer>).)*</think>\s*<answer>(?:(?!</?think>|</?answer>).)*</answer>\s*"
"""What was thought, then the answer, each once, and nothing else."""


def _compilable(pattern: str) -> str:
    try:
        _compiled(pattern)
    except regex.error as error:
        raise ValueError(f"is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compilable)]


def format_(
    prompts: Sequence[str], responses: Sequence[str], references: Sequence[str], *, pattern: Pattern = THINK_ANSWER
) -> list[float]:
    """1 for each response that the pattern describes from its first to its last character, else 0.

    Args:
        prompts: not looked at.
        responses: what is judged.
        references: not looked at.
        pattern: ``.`` is any character; by default ``<think>...</think><answer>...</answer>``.
    """
    return regex_(prompts, responses, references, pattern=pattern, full=True)


def regex_(
    prompts: Sequence[str],
    responses: Sequence[str],
    references: Sequence[str],
    *,
    pattern: Pattern,
    full: bool = False,
    reward: float = 1.0,
) -> list[float]:
    """``reward`` for each response in which the pattern is found, else 0.

    A search that takes longer than ``LONGEST_SEARCH`` has found nothing; the log says so.

    Args:
        prompts: not looked at.
        responses: what is judged.
        references: not looked at.
        pattern: ``.`` is any character.
        full: it has to describe the whole response.
        reward: may be below 0.
    """
    compiled = _compiled(pattern)
    match = compiled.fullmatch if full else compiled.search
    given, late = [], 0
    for response in responses:
        try:
            given.append(reward if match(response, timeout=LONGEST_SEARCH) else 0.0)
        except TimeoutError:
            given.append(0.0)
            late += 1
    if late:
        log.warning(
            "reward_options: the pattern %r takes longer than %g s on %d of %d answers, which count as not matching; write it "
            "so that no two parts of it can match the same text",
            pattern, LONGEST_SEARCH, late, len(responses),
        )  # fmt: skip
    return given


@functools.cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern, regex.DOTALL)
