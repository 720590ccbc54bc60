from __future__ import annotations

import numpy as np
import pytest

from tunesmith.data.collator import collate, next_token_targets
from tunesmith.data.loader import DataLoader
from tunesmith.types import Example, Source


def examples(count: int) -> list[Example]:
    made = []
    for index in range(count):
        ids = np.arange(index + 2, dtype=np.int32) + 10 * index
        made.append(Example(ids, ids.copy(), Source("d", "f", index + 1, index + 1)))
    return made


def rows(loader: DataLoader, epoch: int, start: int = 0) -> list[list[list[int]]]:
    return [[[s.row for s in batch.sources] for batch in window] for window in loader.windows(epoch, start)]


def test_collate_lays_rows_end_to_end() -> None:
    batch = collate(examples(2))
    assert batch.input_ids_T.tolist() == [0, 1, 10, 11, 12]
    assert batch.position_ids_T.tolist() == [0, 1, 0, 1, 2]
    assert batch.lengths == (2, 3)
    assert batch.num_tokens == 5
    assert [s.row for s in batch.sources] == [1, 2]


def test_targets_by_hand() -> None:
    positions, targets = next_token_targets(np.array([-100, 7, 8, -100, 9]), (3, 2))
    assert positions.tolist() == [0, 1, 3]
    assert targets.tolist() == [7, 8, 9]


def test_a_supervised_first_token_is_predicted_by_nothing() -> None:
    positions, targets = next_token_targets(np.array([5, 6, 7, 8]), (2, 2))
    assert positions.tolist() == [0, 2]
    assert targets.tolist() == [6, 8]


def test_no_supervised_token() -> None:
    positions, targets = next_token_targets(np.full(4, -100), (4,))
    assert len(positions) == len(targets) == 0


def test_lengths_must_fit() -> None:
    with pytest.raises(AssertionError):
        next_token_targets(np.zeros(5, dtype=np.int64), (2, 2))


def test_windows_in_file_order_with_a_short_last_one() -> None:
    loader = DataLoader(examples(11), batch_size=2, accumulation=2, shuffle=False)
    assert rows(loader, 0) == [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[9, 10], [11]]]
    assert len(loader) == 3


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (4, 2), (1, 8)])
def test_windows_hold_the_same_rows_however_they_are_split(size: int, accumulation: int) -> None:
    loader = DataLoader(examples(22), size, accumulation, seed=3)
    flat = [sorted(r for batch in window for r in batch) for window in rows(loader, 1)]
    reference = [sorted(r for batch in window for r in batch) for window in rows(DataLoader(examples(22), 8, 1, seed=3), 1)]
    assert flat == reference
    assert [len(window) for window in flat] == [8, 8, 6]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    loader = DataLoader(examples(20), 4, seed=7)
    assert rows(loader, 0) == rows(DataLoader(examples(20), 4, seed=7), 0)
    assert rows(loader, 0) != rows(loader, 1)
    assert rows(loader, 0) != rows(DataLoader(examples(20), 4, seed=8), 0)
    assert sorted(r for w in rows(loader, 5) for b in w for r in b) == list(range(1, 21))


def test_starting_in_the_middle_gives_the_rest() -> None:
    loader = DataLoader(examples(20), 3, 2, seed=7)
    for start in range(len(loader) + 1):
        assert rows(loader, 2, start) == rows(loader, 2)[start:]


def grouped(count: int, lengths: np.ndarray, epoch: int = 0, by_length: bool = True) -> list[list[int]]:
    """Row numbers of each window of ``count`` rows of random lengths."""
    made = [Example(np.zeros(n, np.int32), np.zeros(n, np.int32), Source("d", "f", row, row)) for row, n in enumerate(lengths)]
    loader = DataLoader(made, 2, count // 2, seed=3, by_length=by_length)
    return [[row for batch in window for row in batch] for window in rows(loader, epoch)]


@pytest.mark.parametrize("number", [5, 37, 256, 1001])
def test_rows_of_similar_length_share_a_window(number: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 500, number)
    lengths[number - 2] = 900
    windows = grouped(4, lengths)
    assert sorted(row for window in windows for row in window) == list(range(number))
    assert number - 2 in windows[0]
    assert windows == grouped(4, lengths)
    assert number < 8 or windows != grouped(4, lengths, epoch=1)
    assert [len(window) for window in windows[:-1]] == [4] * (len(windows) - 1)
    if number > 100:
        waste = {by_length: sum(len(w) * max(lengths[w]) - sum(lengths[w]) for w in grouped(4, lengths, by_length=by_length))
                 for by_length in (False, True)}  # fmt: skip
        assert waste[True] < 0.2 * waste[False]


def test_grouped_windows_start_in_the_middle_too() -> None:
    loader = DataLoader(examples(50), 2, 2, seed=7, by_length=True)
    assert [rows(loader, 1, start) for start in range(len(loader))] == [rows(loader, 1)[start:] for start in range(len(loader))]
