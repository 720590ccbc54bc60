"""Loops of which only the ends are gone through where memory alone is asked for, and not the result.

Kernels that work in blocks take the same memory in every turn, or most in the last. A plan of memory runs them on tensors
without content, where going through thousands of turns would take minutes and tell nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
_ENDS_ONLY: ContextVar[bool] = ContextVar("ends_only", default=False)


@contextmanager
def ends_only() -> Iterator[None]:
    """Within this, loops over ``sampled`` go through their first and last turn; their results are wrong."""
    token = _ENDS_ONLY.set(True)
    try:
        yield
    finally:
        _ENDS_ONLY.reset(token)


def sampled(turns: Iterable[T]) -> Iterable[T]:
    """The turns of a loop; the first and the last within ``ends_only``.

    Example:
        ``sampled([1, 2, 3])`` -> 1, 2, 3; within ``ends_only``: 1, 3.
    """
    if not _ENDS_ONLY.get():
        return turns
    every = list(turns)
    return every if len(every) < 3 else [every[0], every[-1]]
