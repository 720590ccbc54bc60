from __future__ import annotations

import random
import time

from tunesmith.data.pack import pack


def first_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """The textbook, without a tree."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = min(lengths[row], capacity)
        fitting = next((i for i, room in enumerate(rooms) if room >= length), None)
        if fitting is None:
            packs.append([])
            rooms.append(capacity)
            fitting = len(packs) - 1
        packs[fitting].append(row)
        rooms[fitting] -= length
    return packs


def test_worked_by_hand() -> None:
    assert pack([5, 7, 5, 2, 4], 10) == [[1, 3], [0, 2], [4]]
    assert pack([], 10) == []
    assert pack([30, 3], 10) == [[0], [1]]


def test_equals_the_textbook() -> None:
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(1, 120) for _ in range(rng.randint(1, 60))]
        assert pack(lengths, 100) == first_fit_decreasing(lengths, 100)


def test_no_row_is_lost_and_no_pack_overfull() -> None:
    rng = random.Random(1)
    lengths = [rng.randint(8, 256) for _ in range(1000)]
    packs = pack(lengths, 256)
    assert sorted(row for rows in packs for row in rows) == list(range(1000))
    assert all(sum(lengths[row] for row in rows) <= 256 for rows in packs)
    assert sum(lengths) / (256 * len(packs)) > 0.97


def test_time_grows_with_n_log_n() -> None:
    rng = random.Random(2)
    lengths = [rng.randint(1, 2048) for _ in range(40_000)]

    def best(rows: list[int]) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            pack(rows, 2048)
            times.append(time.perf_counter() - began)
        return min(times)

    assert best(lengths) < 10 * best(lengths[:10_000])
