from __future__ import annotations

import csv
import gzip
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from transformers import AutoTokenizer

from tests.conftest import make_rows, write_dataset
from tunesmith.config.arguments import RunConfig
from tunesmith.config.load import load_config
from tunesmith.data import mixture, prefetch, streaming
from tunesmith.data.loader import StreamLoader
from tunesmith.data.prepare import load_examples
from tunesmith.data.report import LISTED, DataReport, Finding
from tunesmith.data.streaming import ExampleStream, Position, load_stream
from tunesmith.errors import DataError
from tunesmith.types import Batch, Source


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks to a set, so that cursors point into, between and behind them."""
    monkeypatch.setattr(mixture, "CHUNK", 7)
    monkeypatch.setattr(streaming, "IN_ORDER", 8)


@pytest.fixture
def configure(settings: dict[str, Any]) -> Any:
    def make(**changes: Any) -> RunConfig:
        values = {**settings, "streaming": True, "max_steps": 10, "buffer_size": 8, **changes}
        if not values["streaming"]:
            values.pop("buffer_size")
        return load_config(None, [f"{key}={json.dumps(value)}" for key, value in values.items()])[0]

    return make


@pytest.fixture
def two_sets(dataset: Path) -> str:
    write_dataset(dataset, make_rows(31, 5), "more")
    return "rows,more"


@pytest.fixture
def corpus(dataset: Path) -> str:
    lines = [row["output"] + "\n" for row in make_rows(60, 5)]
    write_dataset(dataset, [], "corpus")
    (dataset / "corpus.txt").write_text("".join(lines), encoding="utf-8")
    registry = json.loads((dataset / "dataset_info.json").read_text())
    registry["corpus"] = {"file_name": "corpus.txt"}
    (dataset / "dataset_info.json").write_text(json.dumps(registry))
    return "corpus"


def stream_of(config: RunConfig) -> ExampleStream:
    return load_stream(config, AutoTokenizer.from_pretrained(config.model.model_name_or_path), DataReport())[0]


def stored(config: RunConfig) -> list[list[int]]:
    rows, _ = load_examples(config, AutoTokenizer.from_pretrained(config.model.model_name_or_path), DataReport())
    return [row.input_ids.tolist() for row in rows]


def streamed(stream: ExampleStream, passes: int = 1) -> list[list[int]]:
    made = []
    for buffer in stream.buffers(stream.beginning()):
        made += [row.ids.tolist() for unit in buffer.units for row in unit]
        if buffer.end.epoch == passes:
            return made
    raise AssertionError


def tokens_of(window: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(batch.input_ids_T.tolist()) for batch in window]


def follow(loader: StreamLoader, count: int, epoch: int = 0, place: dict[str, Any] | None = None) -> Iterator[Any]:
    """(tokens, whether the epoch ends, the place behind it) of the next windows."""
    windows = loader.onward(epoch, 0, place or {})
    for _ in range(count):
        batches, ended = next(windows)
        yield tokens_of(batches), ended, json.loads(json.dumps(loader.place()))
    windows.close()


KINDS = {
    "plain": {},
    "in order": {"disable_shuffling": True, "buffer_size": 16384},
    "packed": {"packing": True, "cutoff_len": 120},
    "two sets": {"dataset": "rows,more"},
    "under": {"dataset": "rows,more", "mix_strategy": "interleave_under"},
    "over": {"dataset": "rows,more", "mix_strategy": "interleave_over"},
    "shares": {"dataset": "rows,more", "mix_strategy": "interleave_over", "interleave_probs": [0.4, 0.6]},
    "blocks": {"dataset": "corpus", "stage": "pt", "cutoff_len": 64},
    "held out": {"dataset": "rows,more", "mix_strategy": "interleave_under", "val_size": 5, "eval_steps": 5},
}


@pytest.mark.parametrize("kind", ["in order", "two sets", "under", "over", "blocks"])
def test_in_file_order_a_stream_gives_what_is_stored(configure: Any, two_sets: str, corpus: str, kind: str) -> None:
    changes = {**KINDS[kind], "disable_shuffling": True, "buffer_size": 16384}
    assert streamed(stream_of(configure(**changes))) == stored(configure(**changes, streaming=False))


@pytest.mark.parametrize("kind", KINDS)
def test_every_place_leads_on_to_the_same_rows(configure: Any, two_sets: str, corpus: str, kind: str) -> None:
    config = configure(**KINDS[kind])
    whole = list(follow(StreamLoader(stream_of(config), 2, 2), 40))
    ends = [index for index, (_, ended, _) in enumerate(whole) if ended]
    assert len(ends) >= 2
    for index in sorted({*range(0, 36, 4), *(end for end in ends if end < 36)}):
        loader = StreamLoader(stream_of(config), 2, 2)
        epoch = sum(end <= index for end in ends)
        assert list(follow(loader, 4, epoch, whole[index][2])) == whole[index + 1 : index + 5]


@pytest.mark.parametrize("kind", [".csv.gz", ".parquet", ".json.zst", "folder"])
def test_every_kind_of_source_is_streamed_and_found_again(configure: Any, dataset: Path, kind: str) -> None:
    rows = make_rows(30, 3)
    path = dataset / f"other{kind.removeprefix('folder')}"
    if kind == ".csv.gz":
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        path.write_bytes(gzip.compress(text.getvalue().encode()))
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8)
    elif kind == ".json.zst":
        path.write_bytes(zstandard.compress(json.dumps(rows).encode()))
    else:
        path.mkdir()
        for part in range(3):
            lines = [json.dumps(row) + "\n" for row in rows[10 * part : 10 * part + 10]]
            (path / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    config = configure(dataset=str(path))
    assert sorted(streamed(stream_of(config))) == sorted(stored(configure(dataset=str(path), streaming=False)))
    whole = list(follow(StreamLoader(stream_of(config), 4), 12))
    for index in (2, 5, 8):
        epoch = sum(ended for _, ended, _ in whole[: index + 1])
        loader = StreamLoader(stream_of(config), 4)
        assert list(follow(loader, 3, epoch, whole[index][2])) == whole[index + 1 : index + 4]


@pytest.mark.parametrize("kind", ["plain", "packed", "two sets", "blocks"])
def test_an_epoch_holds_every_row_once_in_an_order_of_its_own(configure: Any, two_sets: str, corpus: str, kind: str) -> None:
    config = configure(**KINDS[kind])
    first = streamed(stream_of(config))
    both = streamed(stream_of(config), passes=2)
    assert both[: len(first)] == first
    assert sorted(both[len(first) :]) == sorted(first)
    assert both[len(first) :] != first
    plain = configure(**{**KINDS[kind], "packing": False})
    assert sorted(first) == sorted(streamed(stream_of(replace_order(plain))))


def replace_order(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"disable_shuffling": True})})


def test_packs_are_full_and_whole(configure: Any, two_sets: str) -> None:
    stream = stream_of(configure(**KINDS["packed"], dataset="rows,more"))
    buffer = next(iter(stream.buffers(stream.beginning())))
    assert all(sum(len(row.ids) for row in unit) <= 120 for unit in buffer.units)
    assert len(buffer.units) < 8


def test_a_going_on_reads_one_buffer_anew(configure: Any, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(dataset, make_rows(200))
    config = configure()
    *_, (_, _, place) = follow(StreamLoader(stream_of(config), 4), 40)
    loader = StreamLoader(stream_of(config), 4)
    made: list[int] = []
    chunks = loader.stream.sets[0].chunks
    make = chunks.make
    monkeypatch.setattr(chunks, "make", lambda batch: made.append(batch[0].source.row) or make(batch))
    next(follow(loader, 1, 0, place))
    assert 140 < min(made) <= 160
    assert len(json.dumps(place)) < 2000


def test_rows_are_counted_once_however_often_they_are_read(configure: Any, two_sets: str, dataset: Path) -> None:
    rows: list[Any] = make_rows(22)
    rows[4]["output"] = rows[20]["output"] = ""
    write_dataset(dataset, rows)
    config = configure(dataset=two_sets)
    loader = StreamLoader(stream_of(config), 2)
    place = [place for *_, place in follow(loader, 80)][9]
    assert (loader.report.read, loader.report.kept, loader.report.left_out()) == (53, 51, 2)
    whole = loader.report.to_dict()
    loader = StreamLoader(stream_of(config), 2)
    list(follow(loader, 70, 0, place))
    assert loader.report.to_dict() == whole


def test_rows_that_end_the_run_are_named_when_they_are_reached(configure: Any, dataset: Path) -> None:
    rows: list[Any] = make_rows(40)
    del rows[33]["output"]
    write_dataset(dataset, rows)
    loader = StreamLoader(stream_of(configure()), 4)
    windows = loader.onward(0, 0, {})
    before = [tokens_of(next(windows)[0]) for _ in range(5)]
    assert len(before) == 5
    with pytest.raises(DataError, match=r"rows\.jsonl:34 \(row 34\): no column 'output'"):
        list(windows)
    loader = StreamLoader(stream_of(configure(on_bad_row="drop")), 4)
    assert [tokens for tokens, _, _ in follow(loader, 5)] == before
    list(follow(loader, 9))
    assert loader.report.left_out() == 1


def test_the_head_is_evaluated_on_and_never_trained_on(configure: Any, two_sets: str) -> None:
    config = configure(dataset=two_sets, mix_strategy="interleave_over", val_size=5, eval_steps=5)
    tokenizer = AutoTokenizer.from_pretrained(config.model.model_name_or_path)
    stream, held_out = load_stream(config, tokenizer, DataReport())
    assert held_out is not None
    assert [str(example.source).rpartition("/")[2] for example in held_out] == [
        "rows.jsonl:1 (row 1)", "rows.jsonl:2 (row 2)", "rows.jsonl:3 (row 3)", "more.jsonl:1 (row 1)", "more.jsonl:2 (row 2)",
    ]  # fmt: skip
    trained = streamed(stream, passes=2)
    assert not {tuple(e.input_ids.tolist()) for e in held_out} & {tuple(ids) for ids in trained}
    with pytest.raises(DataError, match="first 23 rows, but it has only 22"):
        stream_of(configure(val_size=23, eval_steps=5))
    with pytest.raises(DataError, match=r"some must be left to train on; lower val_size$"):
        stream_of(configure(val_size=22, eval_steps=5))
    with pytest.raises(
        DataError, match="it has only 4, and some must be left to train on; lower val_size, or raise max_samples"
    ):
        stream_of(configure(val_size=5, max_samples=4, eval_steps=5))


def test_shares_are_kept(configure: Any, dataset: Path) -> None:
    write_dataset(dataset, make_rows(300))
    write_dataset(dataset, make_rows(300, 5), "more")
    config = configure(dataset="rows,more", mix_strategy="interleave_under", interleave_probs=[0.75, 0.25])
    stream = stream_of(config)
    names = []
    for buffer in stream.buffers(stream.beginning()):
        names += [row.source.dataset for unit in buffer.units for row in unit]
        if buffer.last:
            break
    assert names.count("rows") == 300
    assert names.count("rows") / len(names) == pytest.approx(0.75, abs=0.05)


def test_a_change_of_anything_that_matters_is_a_change_of_fingerprint(
    configure: Any, two_sets: str, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"buffer_size": 9}, {"seed": 1}, {"packing": True}, {"cutoff_len": 100}, {"max_samples": 5}, {"dataset": two_sets},
        {"disable_shuffling": True, "buffer_size": 16384}, {"val_size": 2, "eval_steps": 1}, {"default_system": "x"},
        {"dataset": two_sets, "mix_strategy": "interleave_over"},
    ]  # fmt: skip
    prints = [stream_of(configure(**change)).fingerprint() for change in changes]
    assert len(set(prints)) == len(changes)
    assert stream_of(configure()).fingerprint() == prints[0]
    path = dataset / "rows.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("cat", "dog", 1), encoding="utf-8")
    assert stream_of(configure()).fingerprint() != prints[0]
    monkeypatch.setattr(streaming, "_HASHED_WHOLE", 0)
    monkeypatch.setattr(streaming, "_SAMPLE", 16)
    sampled = stream_of(configure()).fingerprint()
    path.write_text(text.replace("cat", "dog", 1)[:-3] + "?}\n", encoding="utf-8")
    assert stream_of(configure()).fingerprint() != sampled


def test_buffers_are_bounded_in_tokens(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MOST_TOKENS", 100)
    stream = stream_of(configure(buffer_size=1000))
    sizes = []
    for buffer in stream.buffers(stream.beginning()):
        sizes.append(sum(len(row.ids) for unit in buffer.units for row in unit))
        if buffer.last:
            break
    assert max(sizes[:-1]) < 100 + 70
    assert min(sizes[:-1]) >= 100


def test_too_little_is_an_error(configure: Any, corpus: str, dataset: Path) -> None:
    stream = stream_of(configure(dataset=corpus, stage="pt", cutoff_len=100_000))
    with pytest.raises(DataError, match=r"60 documents with [\d,]+ tokens do not fill one block"):
        next(stream.buffers(stream.beginning()))
    write_dataset(dataset, [{"instruction": "a", "output": ""}] * 3)
    stream = stream_of(configure())
    with pytest.raises(DataError, match="no trainable tokens"):
        next(stream.buffers(stream.beginning()))
    write_dataset(dataset, make_rows(3), num_samples=2)
    with pytest.raises(DataError, match="num_samples draws from all rows"):
        stream_of(configure())


def test_an_account_names_only_so_many_rows() -> None:
    total = DataReport()
    for number in range(3 * LISTED):
        one = DataReport(read=1)
        message = f"not valid JSON: {number}"
        one.findings["unreadable", message] = Finding(
            "unreadable", "bad-json", message, "", 1, [(Source("d", "f", number, 1), 1)]
        )
        total.merge(one, LISTED)
    assert total.left_out() == total.read == 3 * LISTED
    assert sum(len(finding.rows) for finding in total.findings.values()) == LISTED
    assert len(total.findings) == LISTED + 1


def test_a_declared_column_that_the_first_rows_lack_is_named(configure: Any, dataset: Path) -> None:
    columns = {"prompt": "instruction", "response": "output", "system": "sytem"}
    write_dataset(dataset, make_rows(9), columns=columns)
    (said,) = stream_of(configure()).report.found
    assert "of the first 7 rows" in said
    assert "no row has the column 'sytem'" in said


def test_a_position_survives_json(configure: Any, corpus: str) -> None:
    stream = stream_of(configure(**KINDS["blocks"]))
    buffers = stream.buffers(stream.beginning())
    ends = [next(buffers).end for _ in range(3)]
    assert any(end.skipped for end in ends)
    assert [Position.from_dict(json.loads(json.dumps(end.to_dict()))) for end in ends] == ends


def test_things_made_ahead_come_in_order_and_the_thread_ends() -> None:
    made = []

    def make(stopped: prefetch.Stopped) -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    before = threading.active_count()
    with prefetch.made_ahead(make, 2) as things:
        assert [next(things) for _ in range(3)] == [0, 1, 2]
        time.sleep(0.05)
        assert made == [0, 1, 2, 3, 4]
    assert threading.active_count() == before
    with prefetch.made_ahead(lambda stopped: iter([1, 2])) as things:
        assert list(things) == [1, 2]


def test_an_error_ahead_is_raised_where_it_belongs() -> None:
    def make(stopped: prefetch.Stopped) -> Iterator[int]:
        yield 1
        raise DataError("broken")

    with prefetch.made_ahead(make, 5) as things:
        time.sleep(0.02)
        assert next(things) == 1
        with pytest.raises(DataError, match="broken"):
            next(things)
