from __future__ import annotations

import pytest

from tunesmith.report.plot import smooth


def test_smooth_by_hand() -> None:
    assert smooth([]) == []
    assert smooth([3.0]) == [3.0]
    assert smooth([1.0, 2.0, 3.0]) == pytest.approx([1.0, 1.1, 1.29])
    assert smooth([1.0, 2.0], 0.5) == [1.0, 1.5]
