from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_rows, write_dataset
from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.registry import load_attrs, parse_entry
from tunesmith.data.source import read_rows
from tunesmith.errors import DataError


def attr(**values: Any) -> DatasetAttr:
    return DatasetAttr(dataset_name="d", **values)


def read(folder: Path, name: str, data: bytes | str, **values: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return read_rows(attr(file_name=name, **values), str(folder))


def test_jsonl_and_array_give_the_same_rows_with_their_lines(tmp_path: Path) -> None:
    rows = make_rows(3)
    lines = read(tmp_path, "a.jsonl", "\n".join(json.dumps(r) for r in rows))
    array = read(tmp_path, "a.json", json.dumps(rows, indent=1))
    assert [r for r, _ in lines] == [r for r, _ in array] == rows
    assert [(s.row, s.line) for _, s in lines] == [(1, 1), (2, 2), (3, 3)]
    assert [(s.row, s.line) for _, s in array] == [(1, 2), (2, 7), (3, 12)]


def test_json_lines_in_a_json_file(tmp_path: Path) -> None:
    assert len(read(tmp_path, "a.json", '{"a": 1}\n\n{"a": 2}\n')) == 2


def test_bad_json_on_line_57_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(r) for r in make_rows(80)]
    lines[56] = '{"instruction": "x", "output": "no end}'
    with pytest.raises(DataError, match=r"a\.jsonl:57:32  not valid JSON: Unterminated string"):
        read(tmp_path, "a.jsonl", "\n".join(lines))


def test_bad_json_in_an_array_is_named(tmp_path: Path) -> None:
    text = json.dumps(make_rows(20), indent=1).replace('"output"', "output", 1)
    with pytest.raises(DataError, match=r"a\.json:5:\d+  not valid JSON"):
        read(tmp_path, "a.json", text)
    with pytest.raises(DataError, match=r"a\.json:2:3  not valid JSON: expected ','"):
        read(tmp_path, "a.json", "[{}\n  {}]")
    with pytest.raises(DataError, match=r"a\.json:1:\d+  not valid JSON"):
        read(tmp_path, "a.json", '[{"a": 1},')


@pytest.mark.parametrize("row", ["3", "null", '"text"', "[1]"])
def test_rows_that_are_no_objects(tmp_path: Path, row: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:2  row 2: expected an object"):
        read(tmp_path, "a.jsonl", "{}\n" + row)


def test_encodings(tmp_path: Path) -> None:
    text = json.dumps({"a": "你好"}, ensure_ascii=False)
    assert read(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + text.encode())[0][0] == {"a": "你好"}
    assert read(tmp_path, "a.jsonl", (text + "\r\n" + text).encode())[1][0] == {"a": "你好"}
    with pytest.raises(DataError, match=r"a\.jsonl:2  not UTF-8 .*GBK"):
        read(tmp_path, "a.jsonl", b'{"a": 1}\n' + text.encode("gbk"))
    with pytest.raises(DataError, match="UTF-16"):
        read(tmp_path, "a.jsonl", text.encode("utf-16"))


def test_unread_formats_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\.csv are not read"):
        read(tmp_path, "a.csv", "a,b")
    with pytest.raises(DataError, match="holds no rows"):
        read(tmp_path, "a.jsonl", "\n")
    with pytest.raises(DataError, match=r"no such file: .*gone\.jsonl"):
        read_rows(attr(file_name="gone.jsonl"), str(tmp_path))


def test_a_line_nested_too_deeply(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:1  nested too deeply"):
        read(tmp_path, "a.jsonl", "[" * 100_000)


def test_sha1(tmp_path: Path) -> None:
    data = b'{"a": 1}\n'
    assert read(tmp_path, "a.jsonl", data, dataset_sha1=hashlib.sha1(data).hexdigest())
    with pytest.raises(DataError, match=hashlib.sha1(data).hexdigest()):
        read(tmp_path, "a.jsonl", data, dataset_sha1="0" * 40)


def test_num_samples_draws_the_same_rows_each_time_and_repeats(tmp_path: Path) -> None:
    data = "".join(json.dumps({"a": i}) + "\n" for i in range(10))
    first = [r["a"] for r, _ in read(tmp_path, "a.jsonl", data, num_samples=4)]
    assert first == [r["a"] for r, _ in read(tmp_path, "a.jsonl", data, num_samples=4)]
    assert len(set(first)) == 4
    assert sorted(r["a"] for r, _ in read(tmp_path, "a.jsonl", data, num_samples=20)) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x.json"])
def test_d1_paths_do_not_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="leaves dataset_dir"):
        read_rows(attr(file_name=name), str(tmp_path))


def test_d1_links_do_not_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.jsonl").write_text("{}")
    (tmp_path / "data" / "a.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match="leaves dataset_dir"):
        read_rows(attr(file_name="a.jsonl"), str(tmp_path / "data"))


def test_registry_names_what_is_wrong(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, make_rows(1))
    assert load_attrs(str(folder), ("rows",))[0].prompt_column == "instruction"
    with pytest.raises(DataError, match="did you mean 'rows'"):
        load_attrs(str(folder), ("row",))
    with pytest.raises(DataError, match=r"dataset_info\.json: no such file"):
        load_attrs(str(tmp_path / "none"), ("rows",))
    (folder / "dataset_info.json").write_text("{\n bad")
    with pytest.raises(DataError, match=r"dataset_info\.json:2:2"):
        load_attrs(str(folder), ("rows",))


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": "a", "formating": "alpaca"}, "unknown key 'formating'"),
        ({"file_name": "a", "formatting": "csv"}, "formatting"),
        ({"file_name": "a", "ranking": True}, "preference pairs"),
        ({"file_name": "a", "columns": {"images": "i"}}, "images"),
        ({"file_name": "a", "tags": {"role": "r"}}, "unknown tags: role"),
        ({"hf_hub_url": "org/name"}, "hf_hub_url is not supported"),
        ({"script_url": "evil.py"}, "script_url is not supported"),
        ({}, "file_name"),
        ("text", "expected an object"),
        ({"file_name": "a", "columns": 3}, "columns must be an object"),
    ],
)
def test_registry_entries_are_checked(entry: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        parse_entry("d", entry, Path("dataset_info.json"))


def test_naming_a_column_unsets_the_others_as_elsewhere() -> None:
    parsed = parse_entry("d", {"file_name": "a", "columns": {"prompt": "q", "response": "a"}}, Path("x"))
    assert (parsed.prompt_column, parsed.query_column, parsed.response_column) == ("q", None, "a")


def test_one_prefix_for_all_or_one_each(tmp_path: Path) -> None:
    write_dataset(tmp_path, make_rows(1), "a")
    write_dataset(tmp_path, make_rows(1), "b")
    assert [x.source_prefix for x in load_attrs(str(tmp_path), ("a", "b"), "p ")] == ["p ", "p "]
    assert [x.source_prefix for x in load_attrs(str(tmp_path), ("a", "b"), "p|q")] == ["p", "q"]


@pytest.mark.parametrize("text", ['[{"a": 1}] [{"a": 2}]', '[{"a": 1}] junk', '[{"a": 1},]'])
def test_nothing_is_lost_after_or_at_the_end_of_an_array(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.json:1:\d+  not valid JSON"):
        read(tmp_path, "a.json", text)
