"""Sets of a hub, against a local server that speaks as much of the hub's protocol as its client needs."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.standin import hub
from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.hub import open_layout
from tunesmith.data.problem import BadRow
from tunesmith.data.source import data_files, read_rows
from tunesmith.errors import DataError
from tunesmith.types import Source

CARD = """---
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/train.jsonl
  - split: test
    path: en/test.jsonl
- config_name: zh
  data_files: zh/*.jsonl
---
# A set
"""


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


REPOS: dict[str, dict[str, bytes]] = {
    "org/plain": {
        "train.jsonl": jsonl({"a": 1, "m": [{"r": "x"}, "mixed"]}, {"a": 2, "m": None}, {"a": 3, "m": []}),
        "test.jsonl": jsonl({"a": 9, "m": None}),
        "evil.py": b"raise SystemExit('ran')",
        "weights.pkl": b"\x80\x04.",
    },
    "org/folders": {"train.jsonl": jsonl({"a": 1}), "python/data/train.jsonl": jsonl({"a": 7})},
    "org/tables": {"data/train-00000.parquet": parquet([{"a": "一"}]), "data/train-00001.parquet": parquet([{"a": "二"}])},
    "org/card": {
        "README.md": CARD.encode(),
        "en/train.jsonl": jsonl({"t": "one"}, {"t": "two"}),
        "en/test.jsonl": jsonl({"t": "three"}),
        "zh/a.jsonl": jsonl({"t": "一"}, {"t": "二"}),
    },
    "org/subsets": {
        "README.md": CARD.replace("  default: true\n", "").encode(),
        "en/train.jsonl": jsonl({"t": "one"}),
        "en/test.jsonl": jsonl({"t": "two"}),
        "zh/a.jsonl": jsonl({"t": "三"}),
    },
    "org/outside": {"README.md": b"---\nconfigs:\n- config_name: a\n  data_files: /etc/passwd\n---\n", "a.txt": b"x"},
    "org/upwards": {
        "README.md": b"---\nconfigs:\n- data_files:\n  - split: train\n    path: ../../*.json\n---\n",
        "a.txt": b"x",
    },
    "org/away": {"README.md": b"---\nconfigs:\n- data_files: {train: 'http://127.0.0.1:9/x.json'}\n---\n", "a.txt": b"x"},
    "org/broken": {"train.jsonl": jsonl({"a": 1}) + b'{"a": \n'},
    "org/code": {"code.py": b"raise SystemExit('ran')"},
    "wiki": {"data.csv": b"q,a\n1,2\n"},
}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Requests that the hub got; the clients use it and empty caches."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with hub("datasets", REPOS, tmp_path, monkeypatch) as requests:
        yield requests


def hf(name: str, **values: Any) -> DatasetAttr:
    return DatasetAttr(dataset_name="d", load_from="hf_hub", hub_url=name, **values)


def columns(attr: DatasetAttr, skip: int = 0, limit: int | None = None) -> list[Any]:
    return [row.columns for row in read_rows(attr, "nowhere", skip, limit) if not isinstance(row, BadRow)]


def test_rows_of_a_hub_set(asked: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    rows = list(read_rows(hf("org/plain"), "nowhere"))
    expected = [{"a": 1, "m": [{"r": "x"}, "mixed"]}, {"a": 2, "m": None}, {"a": 3, "m": []}]
    assert [row.columns for row in rows] == expected  # type: ignore[union-attr]
    assert [row.source for row in rows] == [Source("d", "hf:org/plain/train", row, 0) for row in (1, 2, 3)]
    assert columns(hf("org/plain"), 1, 2) == expected[1:2]
    assert columns(hf("org/plain", split="test")) == [{"a": 9, "m": None}]
    assert columns(hf("org/plain", split="train[:2]+test")) == [*expected[:2], {"a": 9, "m": None}]
    fetched = {request.rpartition("/")[2] for request in asked if "/resolve/" in request}
    assert fetched == {"train.jsonl", "test.jsonl"}  # neither code nor pickles
    told = [request for request in asked if "/datasets/org/plain" not in request]
    assert [request for request in told if request != "GET /api/agent-harnesses"] == []  # the client's own, of its own hub
    assert "Generating" not in capfd.readouterr().err


def test_files_of_a_hub_set(asked: list[str]) -> None:
    (path,) = data_files(hf("org/plain"), "nowhere")
    assert path.read_bytes() == REPOS["org/plain"]["train.jsonl"]
    data = REPOS["org/plain"]["test.jsonl"]
    assert columns(hf("org/plain", split="test", dataset_sha1=hashlib.sha1(data).hexdigest()))
    with pytest.raises(DataError, match=r"test\.jsonl: its sha256 is"):
        read_rows(hf("org/plain", split="test", dataset_sha256="0" * 64), "nowhere")


def test_subsets_and_splits_of_the_card(asked: list[str]) -> None:
    assert columns(hf("org/card")) == [{"t": "one"}, {"t": "two"}]
    assert columns(hf("org/card", subset="en", split="test")) == [{"t": "three"}]
    assert columns(hf("org/card", subset="zh")) == [{"t": "一"}, {"t": "二"}]
    with pytest.raises(DataError, match="hf:org/card: no subset 'fr'; set subset to one of: en, zh"):
        read_rows(hf("org/card", subset="fr"), "nowhere")
    with pytest.raises(DataError, match="hf:org/subsets: has several subsets; set subset to one of: en, zh"):
        read_rows(hf("org/subsets"), "nowhere")
    with pytest.raises(DataError, match="hf:org/plain: no subset 'en'; it has only 'default'"):
        read_rows(hf("org/plain", subset="en"), "nowhere")
    with pytest.raises(DataError, match="hf:org/card: no split 'dev'; it has train, test"):
        read_rows(hf("org/card", split="dev"), "nowhere")


def test_a_folder_of_a_set(asked: list[str]) -> None:
    assert columns(hf("org/folders", folder="python")) == [{"a": 7}]
    assert [request for request in asked if "/resolve/" in request and "/python/" not in request] == []
    with pytest.raises(DataError, match="no folder 'java'"):
        read_rows(hf("org/folders", folder="java"), "nowhere")
    for folder in ("../x", "/etc", "http://x"):
        with pytest.raises(DataError, match="leaves the set"):
            read_rows(hf("org/folders", folder=folder), "nowhere")


def test_tables_of_a_hub_set(asked: list[str]) -> None:
    assert columns(hf("org/tables")) == [{"a": "一"}, {"a": "二"}]
    assert columns(hf("org/tables"), skip=1) == [{"a": "二"}]


def test_a_name_without_an_owner_and_a_revision(asked: list[str]) -> None:
    assert columns(hf("wiki", revision="v1")) == [{"q": 1, "a": 2}]
    assert "GET /api/datasets/wiki/revision/v1" in asked


@pytest.mark.parametrize(
    ("attr", "said"),
    [
        (hf("org/none"), "hf:org/none: there is no such data set, or it is private"),
        (hf("gated/set"), "hf:gated/set: its owner lets only people in who accepted the terms"),
        (hf("org/plain", revision="v9"), "hf:org/plain@v9: has no revision 'v9'"),
    ],
)
def test_what_cannot_be_fetched(asked: list[str], attr: DatasetAttr, said: str) -> None:
    with pytest.raises(DataError, match=rf"{said}[^\n]*\nWays on: set HF_ENDPOINT .*; or .*ModelScope .*\(ms:.*; or .*path"):
        read_rows(attr, "nowhere")


def test_no_connection_and_offline(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(columns(hf("org/plain"))) == 3
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked.clear()
    assert len(columns(hf("org/plain"))) == 3  # from the cache
    with pytest.raises(DataError, match="hf:org/card: not in the cache, and HF_HUB_OFFLINE is set"):
        read_rows(hf("org/card"), "nowhere")
    assert asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"hf:org/card: the hub cannot be reached: .*\nWays on: "):
        read_rows(hf("org/card"), "nowhere")


@pytest.mark.parametrize("name", ["org/outside", "org/upwards", "org/away"])
def test_a_card_may_not_point_outside_the_set(asked: list[str], name: str) -> None:
    with pytest.raises(DataError, match=rf"hf:{name}: README\.md names data files outside the set: '.*'; refused"):
        read_rows(hf(name), "nowhere")


def test_files_that_cannot_be_read(asked: list[str]) -> None:
    with pytest.raises(DataError, match="hf:org/code: holds no data files that are read"):
        read_rows(hf("org/code"), "nowhere")
    with pytest.raises(DataError, match=r"hf:org/broken: its files cannot be read: .*then the line is named"):
        list(read_rows(hf("org/broken"), "nowhere"))
    with pytest.raises(DataError, match="no name on a hub"):
        read_rows(hf("../../etc"), "nowhere")


def test_what_another_program_left_in_the_cache_is_not_run(asked: list[str], tmp_path: Path) -> None:
    (path,) = data_files(hf("org/plain"), "nowhere")
    for number in range(9):
        (path.parent / f"train-{number}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"what it holds cannot be made out: .*webdataset"):
        read_rows(hf("org/plain"), "nowhere")
    (path.parent / "test.jsonl").rename(path.parent / "rest.jsonl")
    with pytest.raises(DataError, match="holds files for the reader 'webdataset'"):
        open_layout(path.parent, hf("org/plain"), "hf:org/plain")
    (path.parent / "rest.jsonl").rename(path.parent / "test.jsonl")
    for number in range(9):
        (path.parent / f"train-{number}.tar").unlink()
    secret = tmp_path / "secret.jsonl"
    secret.write_text('{"a": 1}\n')
    (path.parent / "train-1.jsonl").symlink_to(secret)
    with pytest.raises(DataError, match="lies outside the set; refused"):
        read_rows(hf("org/plain"), "nowhere")


def test_modelscope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    calls: list[Any] = []

    def dataset_snapshot_download(dataset_id: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        calls.append((dataset_id, revision))
        if dataset_id == "org/none":
            raise RuntimeError("404\nmore")
        assert "README.md" in allow_patterns
        assert not any(pattern.endswith((".py", "*")) for pattern in allow_patterns)
        folder = tmp_path / "ms" / dataset_id
        shutil.rmtree(folder, ignore_errors=True)
        for name, data in REPOS[dataset_id].items():
            if name.endswith((".jsonl", ".md")):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
        return str(folder)

    module = types.ModuleType("modelscope")
    module.dataset_snapshot_download = dataset_snapshot_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", module)
    ms = DatasetAttr(dataset_name="d", load_from="ms_hub", hub_url="org/card", revision="v2")
    rows = list(read_rows(ms, "nowhere"))
    assert [row.columns for row in rows] == [{"t": "one"}, {"t": "two"}]  # type: ignore[union-attr]
    assert rows[0].source == Source("d", "ms:org/card/train", 1, 0)
    assert calls == [("org/card", "v2")]
    with pytest.raises(DataError, match="ms:org/none@v2: cannot be fetched: RuntimeError: 404"):
        read_rows(ms.model_copy(update={"hub_url": "org/none"}), "nowhere")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(DataError, match=r'pip install "tunesmith\[modelscope\]"'):
        read_rows(ms, "nowhere")
