"""Rows of a data set with their places: folders, hashes, containment, skip and limit."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.data.test_files import make_every_kind
from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.problem import BadRow
from tunesmith.data.registry import load_attrs
from tunesmith.data.source import RawRow, data_files, file_sha, read_rows
from tunesmith.errors import DataError
from tunesmith.types import Source


def attr(name: str, **values: Any) -> DatasetAttr:
    return DatasetAttr(dataset_name="d", file_name=name, **values)


def read(folder: Path, name: str, data: bytes | str | None = None, **values: Any) -> list[Any]:
    if data is not None:
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_rows(attr(name, **values), str(folder)))


def test_rows_and_bad_rows_with_their_places(tmp_path: Path) -> None:
    good, bad, last = read(tmp_path, "a.jsonl", '\n{"a": 1}\n{"a":\n\n{"a": 3}')
    path = str(tmp_path / "a.jsonl")
    assert good == RawRow({"a": 1}, Source("d", path, 1, 2))
    assert isinstance(bad, BadRow)
    assert bad.source == Source("d", path, 2, 3)
    assert (bad.problem.code, bad.problem.column) == ("bad-json", 6)
    assert last == RawRow({"a": 3}, Source("d", path, 3, 5))


def test_skip_and_limit_are_a_slice_of_every_kind(tmp_path: Path) -> None:
    def plainly(rows: Any) -> list[tuple[Any, str]]:
        return [(row.source, str(row[1] if isinstance(row, BadRow) else row.columns)) for row in rows]

    for path in make_every_kind(tmp_path):
        whole = plainly(read_rows(attr(path.name), str(tmp_path)))
        for skip, limit in ((0, 3), (5, 5), (5, 4), (0, 0), (1, 2400), (2400, None), (701, 1402), (2490, 9999), (9999, None)):
            assert plainly(read_rows(attr(path.name), str(tmp_path), skip, limit)) == whole[skip:limit], (path, skip, limit)


def test_a_row_behind_the_limit_is_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2} broken')
    assert [row.columns for row in read_rows(attr("a.json"), str(tmp_path), 1, 2)] == [{"a": 2}]  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"a\.json:1:21"):
        list(read_rows(attr("a.json"), str(tmp_path)))


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "b.jsonl").write_text('{"n": 3}\n{"n": 4}')
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"n": 1}\n\n{"n": 2}'))
    (folder / "c.jsonl").write_text("\n")
    (folder / "d.json").write_text('[{"n": 5}]')
    (folder / "README.md").write_text("x")
    rows = read(tmp_path, "set")
    assert [row.columns["n"] for row in rows] == [1, 2, 3, 4, 5]
    assert [(Path(row.source.file).name, row.source.row, row.source.line) for row in rows] == [
        ("a.jsonl.gz", 1, 1), ("a.jsonl.gz", 2, 3), ("b.jsonl", 1, 1), ("b.jsonl", 2, 2), ("d.json", 1, 1),
    ]  # fmt: skip
    for skip in range(6):
        for limit in range(7):
            assert list(read_rows(attr("set"), str(tmp_path), skip, limit)) == rows[skip:limit]
    assert [path.name for path in data_files(attr("set"), str(tmp_path))] == ["a.jsonl.gz", "b.jsonl", "c.jsonl", "d.json"]


def test_no_rows(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "\n"), ("a.json", "[]"), ("a.csv", "a,b\n"), ("a.txt", ""), ("a.arrow", "")):
        with pytest.raises(DataError, match="holds no rows"):
            read(tmp_path, name, text)
    assert list(read_rows(attr("a.jsonl"), str(tmp_path), limit=0)) == []


def test_hashes(tmp_path: Path) -> None:
    data = b'{"a": 1}\n'
    sha1, sha256 = hashlib.sha1(data).hexdigest(), hashlib.sha256(data).hexdigest()
    assert len(read(tmp_path, "a.jsonl", data, dataset_sha1=sha1.upper(), dataset_sha256=sha256)) == 1
    assert file_sha(tmp_path / "a.jsonl") == sha256
    for wrong in ({"dataset_sha1": "0" * 40}, {"dataset_sha256": "0" * 64}):
        with pytest.raises(DataError, match=f"({sha1}|{sha256}), but dataset_info.json says 0000"):
            read_rows(attr("a.jsonl", **wrong), str(tmp_path))
        with pytest.raises(DataError, match=f"({sha1}|{sha256})"):
            data_files(attr("a.jsonl", **wrong), str(tmp_path))
    (tmp_path / "set").mkdir()
    for name in "ab":
        (tmp_path / "set" / f"{name}.jsonl").write_bytes(data)
    with pytest.raises(DataError, match="has 2 files, but dataset_sha1 is the hash of one"):
        read_rows(attr("set", dataset_sha1=sha1), str(tmp_path))


def test_missing_files_and_things_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*gone\.jsonl"):
        read_rows(attr("gone.jsonl"), str(tmp_path))
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_rows(attr("/dev/null", inline=True), str(tmp_path))
    with pytest.raises(DataError, match="names no file"):
        read_rows(DatasetAttr(dataset_name="d"), str(tmp_path))
    (tmp_path / "a.jsonl").write_text("{}")
    for values in ({"subset": "en"}, {"folder": "x"}, {"split": "test"}):
        with pytest.raises(DataError, match="no subset, split or folder to choose from"):
            read_rows(attr("a.jsonl", **values), str(tmp_path))
    assert list(read_rows(attr("a.jsonl", split="train"), str(tmp_path)))


def test_d1_nothing_outside_is_opened_and_nothing_is_fetched(tmp_path: Path) -> None:
    hits: list[str] = []

    class Sink(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Sink)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    folder = tmp_path / "data"
    folder.mkdir()
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    secret = tmp_path / "secret.jsonl"
    secret.write_text("{}")
    (folder / "link.jsonl").symlink_to(secret)
    (folder / "inner").mkdir()
    (folder / "inner" / "link.jsonl").symlink_to(secret)
    (folder / "out").symlink_to(tmp_path)
    address = f"http://127.0.0.1:{server.server_port}/x.json"
    names = [
        "../../../etc/passwd",
        "../secret.jsonl",
        str(secret),
        "link.jsonl",
        "inner",
        "out/secret.jsonl",
        f"file://{secret}",
    ]
    entries: dict[str, Any] = {name: {"file_name": name} for name in [*names, address]}
    entries["script"] = {"script_url": "evil.py"}
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    try:
        for name in entries:
            with pytest.raises(DataError, match=r"leaves dataset_dir|never run"):
                list(read_rows(load_attrs(str(folder), (name,))[0], str(folder)))
            if name != "script":
                with pytest.raises(DataError, match="leaves dataset_dir"):
                    data_files(attr(name), str(folder))
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert hits == []
    assert not marker.exists()
    assert len(read(tmp_path, str(secret), inline=True)) == 1
    assert len(read(tmp_path, str(folder / "link.jsonl"), inline=True)) == 1


def test_the_demo_sets_have_the_rows_that_a_plain_parser_finds(shared: Path) -> None:
    folder = shared / "data" / "demo"
    seen = 0
    for name, entry in json.loads((folder / "dataset_info.json").read_text(encoding="utf-8")).items():
        path = folder / entry.get("file_name", "-")
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                expected = json.loads(text)
            elif path.suffix == ".jsonl":
                expected = [json.loads(line) for line in text.splitlines()]
            else:
                expected = [{"text": line} for line in text.split("\n") if line.strip()]
            rows = list(read_rows(load_attrs(str(folder), (name,))[0], str(folder)))
            assert [row.columns for row in rows] == expected  # type: ignore[union-attr]
            seen += 1
    assert seen == 10


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        (tmp_path / f"{count}.jsonl").write_text("".join(f'{{"a": "{i:090}"}}\n' for i in range(count)))
        tracemalloc.start()
        assert sum(1 for _ in read_rows(attr(f"{count}.jsonl"), str(tmp_path))) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)
    assert peak(100_000) < 1.5 * peak(10_000)


# ---- sets that datasets saved, and folders in its layout


PLAIN = [{"a": i, "m": [{"role": "user", "content": "你好"}]} for i in range(30)]


@pytest.fixture
def no_progress() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.filterwarnings(
    "ignore:unclosed file.*state.json:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_what_save_to_disk_wrote(tmp_path: Path, no_progress: None) -> None:
    table = datasets.Dataset.from_list(PLAIN, split="train")
    table.save_to_disk(tmp_path / "one", num_shards=3)
    assert [row.columns for row in read(tmp_path, "one")] == PLAIN
    assert [path.name for path in data_files(attr("one"), str(tmp_path))] == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    with pytest.raises(DataError, match=r"is the split 'train'.* not 'test'"):
        read(tmp_path, "one", split="test")
    datasets.DatasetDict({"train": table, "test": table.select(range(7))}).save_to_disk(tmp_path / "two")
    assert [row.columns for row in read(tmp_path, "two")] == PLAIN
    assert [row.columns for row in read(tmp_path, "two", split="test")] == PLAIN[:7]
    with pytest.raises(DataError, match="no split 'dev'; it holds train, test"):
        read(tmp_path, "two", split="dev")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: missing"):
        read(tmp_path, "one")
    for text in ("{", "[]", '{"_data_files": 3}', '{"_data_files": [{"filename": "../x.arrow"}]}', '{"_data_files": [3]}'):
        (tmp_path / "one" / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"not what save_to_disk writes|names a file"):
            read(tmp_path, "one")


def test_a_split_of_a_folder_in_the_layout_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split, rows in (("train", PLAIN), ("test", PLAIN[:7])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read(tmp_path, "set")) == 37  # no split asked for: all files
    rows = read(tmp_path, "set", split="test")
    assert [row.columns for row in rows] == PLAIN[:7]
    assert rows[3].source == Source("d", f"{folder}/test", 4, 0)
    assert [path.name for path in data_files(attr("set", split="test"), str(tmp_path))] == ["test.jsonl"]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        read_rows(attr("set", split="dev"), str(tmp_path))
