"""Stores: what goes in comes out, an interrupted one goes on, damage and full disks are told."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from tunesmith.data.learned import Learned
from tunesmith.data.report import DataReport, pack_report, unpack_report
from tunesmith.data.selection import Blocks, Selection, draw, interleave, joined, split
from tunesmith.data.store import JOURNAL, StoreWriter, TokenSet, partial
from tunesmith.errors import DataError
from tunesmith.types import IGNORE_INDEX, Example, Source


def make(count: int, seed: int = 0, file: str = "f.jsonl", views: int = 1) -> list[Example]:
    rng = random.Random(seed)
    made = []
    for row in range(1, count + 1):
        for _ in range(views):
            length = rng.randint(1, 30)
            ids = np.array([rng.randint(0, 400) for _ in range(length)], dtype=np.int32)
            learned = np.array([rng.random() < 0.6 for _ in range(length)])
            weights = (
                np.array([rng.choice([0.5, 1, 2]) for _ in range(length)], dtype=np.float32) if rng.random() < 0.3 else None
            )
            labels = np.where(learned, ids, IGNORE_INDEX).astype(np.int32)
            made.append(Example(ids, labels, Source("d", file, row, row + 1), weights))
    return made


def as_learned(example: Example) -> Learned:
    """Every token a span of its own."""
    factors = np.ones(len(example)) if example.weights is None else example.weights
    where = np.flatnonzero(example.labels != IGNORE_INDEX).tolist()
    return Learned(example.input_ids, tuple((i, i + 1, float(factors[i])) for i in where), example.source)


def write(target: Path, examples: list[Example], chunk: int = 7) -> TokenSet:
    writer = StoreWriter(target)
    for begin in range(0, len(examples), chunk):
        part = examples[begin : begin + chunk]
        writer.append([as_learned(e) for e in part], len(part), {"input"}, DataReport(read=len(part), kept=len(part)))
    writer.finish()
    return TokenSet(target, "d")


def assert_same(one: Example, other: Example) -> None:
    assert one.input_ids.tolist() == other.input_ids.tolist()
    assert one.labels.tolist() == other.labels.tolist()
    assert one.source == other.source
    learned = one.labels != IGNORE_INDEX
    factors = [np.ones(len(e), np.float32) if e.weights is None else e.weights for e in (one, other)]
    assert factors[0][learned].tolist() == factors[1][learned].tolist()


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    examples = [*make(40), *make(3, 1, "g.jsonl")]
    store = write(tmp_path / "s", examples)
    assert len(store) == 43
    for one, other in zip(store, examples, strict=True):
        assert_same(one, other)
    assert store.lengths.tolist() == [len(e) for e in examples]
    assert store.supervised.tolist() == [int((e.labels[1:] != IGNORE_INDEX).sum()) for e in examples]
    assert store.progress.report.read == 43
    assert store.progress.columns == {"input"}
    assert_same(store[-1], examples[-1])
    with pytest.raises(IndexError):
        store[43]


def test_an_empty_store(tmp_path: Path) -> None:
    store = write(tmp_path / "s", [])
    assert len(store) == 0
    assert store.lengths.tolist() == []


@pytest.mark.parametrize("torn", [b"", b'{"rows": 9', b"\0\0\0"])
def test_an_interrupted_one_goes_on_to_the_same_bytes(tmp_path: Path, torn: bytes) -> None:
    examples = make(40)
    whole = write(tmp_path / "whole", examples)
    writer = StoreWriter(tmp_path / "cut")
    writer.append([as_learned(e) for e in examples[:7]], 7, {"input"}, DataReport(read=7, kept=7))
    writer.append([as_learned(e) for e in examples[7:14]], 7, {"input"}, DataReport(read=7, kept=7))
    writer.close()
    folder = partial(tmp_path / "cut")
    for name in ("ids", "ends", "places"):  # killed in the middle of the next chunk
        with (folder / name).open("ab") as file:
            file.write(b"\1\2\3\4\5")
    with (folder / JOURNAL).open("ab") as file:
        file.write(torn)
    writer = StoreWriter(tmp_path / "cut")
    assert writer.progress.rows == 14
    for begin in range(14, 40, 7):
        part = examples[begin : begin + 7]
        writer.append([as_learned(e) for e in part], len(part), {"input"}, DataReport(read=len(part), kept=len(part)))
    writer.finish()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert TokenSet(tmp_path / "cut", "d").digest == whole.digest
    assert not folder.exists()


@pytest.mark.parametrize("name", ["ids", "span_ends"])
def test_damage_is_told(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s", make(10))
    data = (tmp_path / "s" / name).read_bytes()
    (tmp_path / "s" / name).write_bytes(data[:-3])
    with pytest.raises(DataError, match=f"{name}: has .* bytes"):
        TokenSet(tmp_path / "s", "d")
    (tmp_path / "s" / name).unlink()
    with pytest.raises(DataError, match=f"{name}: has -1 bytes"):
        TokenSet(tmp_path / "s", "d")


def test_reports_survive_the_journal() -> None:
    report = DataReport(read=3, kept=1, tokens=7, supervised=2, found=["x"])
    for row in range(1500):
        report.add("note", "n", "remark", Source("d", "f", row, row))
    report.add("dropped", "e", "empty", Source("d", "f", 3, 4), "Fill it.", 9)
    again = unpack_report(json.loads(json.dumps(pack_report(report))))
    assert again.to_dict() == report.to_dict()
    assert [f.count for f in again.of("note")] == [1500]
    again.merge(report)
    assert [f.count for f in again.of("note", "dropped")] == [3000, 2]


# ---- selections


def test_split_is_seeded_disjoint_and_keeps_views_together(tmp_path: Path) -> None:
    rows = Selection([write(tmp_path / "s", make(22, views=2))])
    train, held_out = split(rows, 6, seed=1)
    assert (len(train), len(held_out)) == (32, 12)
    ours, theirs = ({e.source.row for e in side} for side in (train, held_out))
    assert not ours & theirs
    assert ours | theirs == set(range(1, 23))
    assert split(rows, 6, seed=1)[1].numbers.tolist() == held_out.numbers.tolist()
    assert split(rows, 6, seed=2)[1].numbers.tolist() != held_out.numbers.tolist()
    assert [e.source.row for e in train] == sorted(e.source.row for e in train)


def test_rows_drawn_twice_stay_on_one_side_and_are_evaluated_once(tmp_path: Path) -> None:
    rows = draw(Selection([write(tmp_path / "s", make(10))]), 25, seed=3)
    assert len(rows) == 25
    train, held_out = split(rows, 4, seed=1)
    assert not set(train.rows.tolist()) & set(held_out.rows.tolist())
    assert len(held_out) == 4


def test_joined_sets_and_their_fingerprint(tmp_path: Path) -> None:
    one, two = (Selection([write(tmp_path / str(n), make(5, n))]) for n in (1, 2))
    both = joined([one, two.pick(np.array([2, 0]))])
    assert [e.source.row for e in both] == [1, 2, 3, 4, 5, 3, 1]
    assert_same(both[5], two[2])
    assert len(set(both.rows.tolist())) == 7
    assert both.fingerprint() != joined([one, two]).fingerprint() != one.fingerprint()


def test_interleaving_by_hand() -> None:
    assert interleave([2, 3], None, False, 0).tolist() == [0, 2, 1]
    assert interleave([2, 3], None, True, 0).tolist() == [0, 2, 1, 3, 0, 4]


def test_interleaving_by_shares() -> None:
    order = interleave([3000, 3000], [0.8, 0.2], True, 7)
    first = np.isin(order, np.arange(3000))
    assert set(order.tolist()) == set(range(6000))
    assert first.mean() == pytest.approx(0.8, abs=0.02)
    assert order.tolist() == interleave([3000, 3000], [0.8, 0.2], True, 7).tolist()
    assert (interleave([3000, 3000], [0.8, 0.2], False, 7) < 6000).all()


def test_blocks_are_the_stream_cut_up(tmp_path: Path) -> None:
    documents = make(200, 5)
    store = Selection([write(tmp_path / "s", documents)])
    for chosen in (store, store.pick(np.arange(0, 200, 3))):
        stream = [i for e in chosen for i in e.input_ids.tolist()]
        owners = [e.source.row for e in chosen for _ in range(len(e))]
        blocks = Blocks(chosen, 16)
        assert len(blocks) == len(stream) // 16
        assert blocks.remainder == len(stream) % 16
        assert [i for b in blocks for i in b.input_ids.tolist()] == stream[: 16 * len(blocks)]
        assert [b.source.row for b in blocks] == owners[: 16 * len(blocks) : 16]
        assert_same(blocks[-1], blocks[len(blocks) - 1])
    assert all(b.labels.tolist() == b.input_ids.tolist() for b in blocks)


def test_parts_keep_what_is_learned_of_them() -> None:
    row = Learned(np.arange(10, dtype=np.int32), ((0, 3, 1.0), (5, 9, 0.5)), Source("d", "f", 1, 1))
    assert row.supervised == 2 + 4
    assert row.part(2, 6).spans == ((0, 1, 1.0), (3, 4, 0.5))
    assert row.part(2, 6).supervised == 1
    assert row.part(3, 5).spans == ()
    whole = row.example()
    assert whole.labels.tolist() == [0, 1, 2, -100, -100, 5, 6, 7, 8, -100]
    assert whole.weights is not None
    assert whole.weights.tolist() == [1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 1]
