"""Tokenised rows in memory, read as stored ones are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tunesmith.data.lazy import Lazy
from tunesmith.data.learned import Learned
from tunesmith.types import Example, Source


class RowsInMemory(Lazy[Example]):
    """A few tokenised rows.

    Args:
        rows: in order.
    """

    def __init__(self, rows: Sequence[Learned]) -> None:
        self._rows = rows

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 ``[N]``."""
        return np.array([len(row.ids) for row in self._rows], dtype=np.int64)

    @property
    def supervised(self) -> int:
        """Tokens that are learned."""
        return sum(row.supervised for row in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def item(self, index: int) -> Example:
        """A row with its labels."""
        return self._rows[index].example()

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of a row, int32, not copied."""
        return self._rows[index].ids

    def source(self, index: int) -> Source:
        """Where a row comes from."""
        return self._rows[index].source

    def fingerprint(self) -> str:
        """SHA-256 of the rows."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(f"{len(row.ids)} {row.spans}".encode())
            digest.update(row.ids.astype("<i4").tobytes())
        return digest.hexdigest()
