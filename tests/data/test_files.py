"""Readers of files, one kind after the other: rows, their lines, and what is wrong with them."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.data import json_parse, stream
from tunesmith.data.files import folder_files, read_file
from tunesmith.data.json_parse import parse_row
from tunesmith.data.json_rows import read_json_array
from tunesmith.data.problem import RowProblem
from tunesmith.errors import DataError


def read(folder: Path, name: str, data: bytes | str) -> list[Any]:
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return list(read_file(path))


def rows(items: list[Any]) -> list[Any]:
    return [content for _, content in items]


def problem(item: Any) -> tuple[int, int | None, str]:
    """(line, column, code)"""
    line, found = item
    assert isinstance(found, RowProblem), found
    assert found.unreadable and found.fix
    return line, found.column, found.code


# ---- JSON, one row a line


def test_lines_and_their_numbers(tmp_path: Path) -> None:
    text = '{"a": 1}\n\n  \r\n{"a": "你"}\r\n\t{"a": [1.5, null, true]}'
    expected = [(1, {"a": 1}), (4, {"a": "你"}), (5, {"a": [1.5, None, True]})]
    for name in ("a.jsonl", "a.ndjson", "a.json", "A.JSONL"):
        assert read(tmp_path, name, text) == expected


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("last", [True, False])
def test_byte_order_mark_and_line_ends_change_nothing(tmp_path: Path, line_end: str, mark: bytes, last: bool) -> None:
    plain = [{"a": i, "b": "你好\r\n"} for i in range(5)]
    lines = line_end.join(json.dumps(row, ensure_ascii=False) for row in plain) + line_end * last
    assert rows(read(tmp_path, "a.jsonl", mark + lines.encode())) == plain
    array = json.dumps(plain, ensure_ascii=False, indent=1).replace("\n", line_end)
    assert rows(read(tmp_path, "a.json", mark + array.encode())) == plain
    table = line_end.join(["a,b", '1,"你,好"', "2,"]) + line_end * last
    assert rows(read(tmp_path, "a.csv", mark + table.encode())) == [{"a": "1", "b": "你,好"}, {"a": "2", "b": ""}]
    text = line_end.join(["你好", "", "b "]) + line_end * last
    assert rows(read(tmp_path, "a.txt", mark + text.encode())) == [{"text": "你好"}, {"text": "b "}]


@pytest.mark.parametrize(
    ("line", "column", "code", "said"),
    [
        ('{"instruction": "x", "output": "no end}', 32, "bad-json", "unclosed string"),
        ('{"a": "你好", "b": 1', 19, "bad-json", "ends too early"),
        ('{"a": "你\tb"}', 9, "bad-json", "control character inside a string"),
        ('{"a": 1,}', 9, "bad-json", "a key in double quotes"),
        ("{'a': 1}", 2, "bad-json", "a key in double quotes"),
        ('{"a": 1 "b": 2}', 9, "bad-json", "comma or a closing bracket"),
        ('{"a" 1}', 6, "bad-json", "colon after the key"),
        ('{"a": nope}', 7, "bad-json", "expected a value"),
        ('{"a": "\\x"}', 8, "bad-json", "escape that JSON does not have"),
        ('{"a": "\\ud8"}', 9, "bad-json", "escape that JSON does not have"),
        ('{"a": 1} {"a": 2}', 10, "bad-json", "one row a line"),
        ('{"a": 1},', 9, "bad-json", "one row a line"),
        ('{"a": "N\\"aN", "b": NaN}', 21, "not-a-number", "NaN is not JSON"),
        ('{"a": [-Infinity]}', 8, "not-a-number", "-Infinity is not JSON"),
        ('{"a": 1e999}', None, "not-a-number", "too large"),
        ('{"a": ' + "9" * 5000 + "}", None, "not-a-number", "thousands of digits"),
        ('{"a": 1, "b": 2, "a": 3}', None, "duplicate-key", "'a' stands twice"),
        ('{"x": [{"a" : "u: v", "a": 3}]}', None, "duplicate-key", "'a' stands twice"),
        ('{"a": "\\\\\\":", "b\\\\": 2, "b\\\\": 3}', None, "duplicate-key", "stands twice"),
        ("3", None, "not-an-object", "found a number"),
        ("null", None, "not-an-object", "found null"),
        ('"text"', None, "not-an-object", "found a string"),
        ("[1]", None, "not-an-object", "found a list"),
        ("true", None, "not-an-object", "true or false"),
        ('{"a": ' + "[" * 128 + "]" * 128 + "}", None, "nested-too-deeply", "128"),
        ('{"a":' * 100_000, None, "nested-too-deeply", "128"),
        ("[" * 100_000, None, "nested-too-deeply", "128"),
    ],
)
def test_what_is_wrong_with_a_line(tmp_path: Path, line: str, column: int | None, code: str, said: str) -> None:
    before, bad, after = read(tmp_path, "a.jsonl", '{"a": 1}\n' + line + '\n{"a": 2}\n')
    assert rows([before, after]) == [{"a": 1}, {"a": 2}]
    assert problem(bad) == (2, column, code)
    assert said in bad[1].message
    assert len(bad[1].message) < 250


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    found = read(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "\xe4\xbd\xa0\xff"}\n{"a": "\0"}\n{"a": "\xed\xa0\x80"}\n{"a": 2}')
    assert problem(found[1]) == (2, 11, "not-utf8")
    assert problem(found[2]) == (3, 8, "nul-character")
    assert problem(found[3]) == (4, 8, "not-utf8")
    assert rows([found[0], found[4]]) == [{"a": 1}, {"a": 2}]


def test_what_is_no_problem_here(tmp_path: Path) -> None:
    line = (
        '{"a": "\\ud800", "b": "\\u0000 \\": \\\\", "c": {"a": {"a": "x:y"}}, "d": 123456789012345678901, "e": 1e300, "f": {}}'
    )
    assert rows(read(tmp_path, "a.jsonl", line)) == [
        {"a": "\ud800", "b": '\0 ": \\', "c": {"a": {"a": "x:y"}}, "d": 123456789012345678901, "e": 1e300, "f": {}}
    ]
    deep = {"a": [1]}
    for _ in range(126):
        deep = {"a": deep}  # type: ignore[dict-item]
    assert rows(read(tmp_path, "a.jsonl", json.dumps(deep))) == [deep]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=4), json_values, max_size=4), st.booleans(), st.sampled_from([None, (",", " : ")]))
def test_a_row_is_what_the_standard_parser_gives(row: dict[str, Any], escaped: bool, separators: Any) -> None:
    text = json.dumps(row, ensure_ascii=escaped, separators=separators)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    assert parse_row(data) == json.loads(text)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", 'c"', "d\\", "e:"]), st.sampled_from(["x", 'u": "v', "\\", ":"])), max_size=4)
)
def test_equal_keys_are_always_found(pairs: list[tuple[str, str]]) -> None:
    text = "{" + ",".join(f"{json.dumps(key)}:{json.dumps(value)}" for key, value in pairs) + "}"
    if len(dict(pairs)) == len(pairs):
        assert parse_row(text.encode()) == dict(pairs)
    else:
        with pytest.raises(RowProblem, match="stands twice"):
            parse_row(text.encode())


def test_forty_seeded_faults_are_found_at_their_lines(tmp_path: Path) -> None:
    rng = random.Random(5)
    lines = [json.dumps({"instruction": f'say {i}: \\ "x"', "output": "好" * rng.randrange(9)}).encode() for i in range(20_000)]
    faults = [
        lambda line: (line[:-3], "bad-json"),
        lambda line: (line.replace(b'", "', b'" "', 1), "bad-json"),
        lambda line: (line.replace(b"say", b"s\x01y"), "bad-json"),
        lambda line: (line.replace(b"say", b"s\xffy"), "not-utf8"),
        lambda line: (line.replace(b'"output"', b'"instruction"'), "duplicate-key"),
        lambda line: (b"[" + line + b"]", "not-an-object"),
        lambda line: (line[:-1] + b', "n": NaN}', "not-a-number"),
        lambda line: (line + b"}", "bad-json"),
    ]
    expected = {}
    for index, number in enumerate(sorted(rng.sample(range(20_000), 40))):
        lines[number], code = faults[index % len(faults)](lines[number])
        expected[number + 1] = code
    found = read(tmp_path, "a.jsonl", b"\n".join(lines))
    assert len(found) == 20_000
    assert {line: content.code for line, content in found if isinstance(content, RowProblem)} == expected
    assert all(line == row for row, (line, _) in enumerate(found, 1))


def test_a_long_line_is_read_and_a_longer_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"a": "x" * 5_000_000}
    assert rows(read(tmp_path, "a.jsonl", json.dumps(long) + "\n{}")) == [long, {}]
    assert rows(read(tmp_path, "a.json", json.dumps([long, {}]))) == [long, {}]
    monkeypatch.setattr(stream, "MAX_ROW", 2_000_000)
    found = read(tmp_path, "a.jsonl", '{"b": 1}\n' + json.dumps(long) + "\n\n{}")
    assert problem(found[1]) == (2, None, "row-too-long")
    assert (found[0], found[2]) == ((1, {"b": 1}), (4, {}))
    assert problem(read(tmp_path, "a.jsonl", json.dumps(long))[0]) == (1, None, "row-too-long")
    assert problem(read(tmp_path, "a.txt", "x" * 2_000_001)[0]) == (1, None, "row-too-long")
    with pytest.raises(DataError, match=r"a\.csv:2  longer than 1 MiB"):
        read(tmp_path, "a.csv", "a\n" + "x" * 2_000_001)
    with pytest.raises(DataError, match=r"a\.json:1:6  .*a row longer than 1 MiB, or one that is never closed"):
        read(tmp_path, "a.json", json.dumps([{}, long])[:4_000_000])


def test_one_object_over_several_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.json:2  begins with one object spread over several lines"):
        read(tmp_path, "a.json", "\n" + json.dumps({"a": 1}, indent=1))


# ---- JSON arrays


def test_rows_of_an_array_have_the_line_they_begin_on(tmp_path: Path) -> None:
    plain = [{"a": 1, "b": [1, 2]}, {"a": "]},{"}, {}]
    found = read(tmp_path, "a.json", "\n" + json.dumps(plain, indent=1))
    assert rows(found) == plain
    assert [line for line, _ in found] == [3, 10, 13]
    assert read(tmp_path, "a.json", "[]") == read(tmp_path, "a.json", " [ \n ] \n") == read(tmp_path, "a.json", "  ") == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=3), max_size=5), st.integers(1, 40), st.booleans())
def test_an_array_read_in_pieces_is_the_array(plain: list[Any], size: int, pretty: bool) -> None:
    text = json.dumps(plain, ensure_ascii=False, indent=2 if pretty else None)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        return
    pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
    assert [content for _, content in read_json_array(Path("a.json"), pieces)] == json.loads(text)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("[{}\n  {}]", "2:3", "expected ',' or ']' after a row"),
        ('[{"a": 1},]', "1:11", "a comma after the last row"),
        ('[{"a": 1}] [{"a": 2}]', "1:12", "text after the end of the array"),
        ('[{"a": 1}] junk', "1:12", "text after the end of the array"),
        ('[{"a": 1},', "1:11", "the file ends before the array does"),
        ('[{"a": 1}', "1:10", "the file ends before the array does"),
        ('[\n{"a": 1},\n{"你": 1, "b": "x', "3:15", "unclosed string"),
        ('[\n{"a": 1},\n{"你": 1, "b": 2', "3:16", "the file ends before the array does"),
        ('[{"a": 1}, {"a": "你\n"}]', "1:20", "line break or control character"),
        ('[{"a": 1}, {"a": "no end}, {"b": 2}]', "1:30", "comma or a closing bracket"),
        ('[{"a": 1},\n {"你": 1, b: 2}]', "2:11", "a key in double quotes"),
        ("[{]", "1:3", "a key in double quotes"),
        ("[,{}]", "1:2", "expected a row"),
        ('[{"a": 1},\n {"a":\0 2}]', "2:7", "a NUL character"),
        ("[}]", "1:2", "expected a row"),
        ("[nope]", "1:2", "expected a value"),
        ("[tru", "1:2", "the file ends before the array does|expected a value"),
        ("[", "1:2", "the file ends before the array does"),
    ],
)
def test_a_broken_array_is_named_with_line_and_column(size: int, text: str, place: str, said: str) -> None:
    data = text.encode()
    pieces = iter([data[at : at + size] for at in range(0, len(data), size)])
    with pytest.raises(DataError, match=rf"a\.json:{place}  not valid JSON: .*({said})"):
        list(read_json_array(Path("a.json"), pieces))


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_bad_rows_of_a_sound_array(size: int) -> None:
    data = b'[{"a": 1}, 3, "x,]", [1, [2]], {"a": 1, "a": 2},\n {"b":\n "\xe4\xbd\xa0", "a": NaN}, {"a": "\xff"},'
    data += b'{"a":' + b"[" * 5000 + b"]" * 5000 + b'}, true, {"z": 1}]'
    found = list(read_json_array(Path("a.json"), iter([data[at : at + size] for at in range(0, len(data), size)])))
    codes = [content.code if isinstance(content, RowProblem) else content for content in rows(found)]
    assert codes == [
        {"a": 1}, "not-an-object", "not-an-object", "not-an-object", "duplicate-key", "not-a-number", "not-utf8",
        "nested-too-deeply", "not-an-object", {"z": 1},
    ]  # fmt: skip
    assert [line for line, _ in found] == [1, 1, 1, 1, 1, 2, 3, 3, 3, 3]
    assert "line 3, column 12" in found[5][1].message
    assert "line 3, column 25" in found[6][1].message


def test_a_long_array_on_one_line_names_the_column(tmp_path: Path) -> None:
    text = json.dumps([{"a": "你" * 50} for _ in range(20_000)], ensure_ascii=False)
    at = text.index("}", len(text) * 9 // 10)
    broken = text[: at - 1] + text[at:]  # a quote is missing
    with pytest.raises(json.JSONDecodeError) as expected:
        json.loads(broken)
    with pytest.raises(DataError, match=rf"a\.json:1:{expected.value.colno}  not valid JSON"):
        read(tmp_path, "a.json", broken)


# ---- encodings and packing


CHINESE = [{"instruction": f"第{i}题：你好，世界", "output": "答案"} for i in range(4000)]


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-16", "looks like UTF-16, .*iconv -f UTF-16 -t UTF-8 a"),
        ("utf-16-le", "looks like UTF-16, .*iconv -f UTF-16LE"),
        ("utf-16-be", "looks like UTF-16, .*iconv -f UTF-16BE"),
        ("utf-32", "looks like UTF-32"),
        ("gbk", "looks like GBK, .*iconv -f GB18030"),
        ("gb18030", "looks like GBK, .*iconv -f GB18030"),
    ],
)
@pytest.mark.parametrize("count", [1, 4000])
def test_foreign_encodings_are_recognised(tmp_path: Path, encoding: str, said: str, count: int) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CHINESE[:count])
    for name, data in (("a.jsonl", text), ("a.txt", text), ("a.csv", "问,答\n" + "你好,世界\n" * count)):
        with pytest.raises(DataError, match=said):
            read(tmp_path, name, data.encode(encoding))
    with pytest.raises(DataError, match=said):
        read(tmp_path, "a.jsonl.gz", gzip.compress(text.encode(encoding), 1))


def test_one_foreign_line_does_not_condemn_the_file(tmp_path: Path) -> None:
    good = json.dumps(CHINESE[0], ensure_ascii=False).encode() + b"\n"
    found = read(tmp_path, "a.jsonl", good * 3 + json.dumps(CHINESE[1], ensure_ascii=False).encode("gbk") + b"\n" + good)
    assert problem(found[3])[2] == "not-utf8"
    assert sum(isinstance(content, dict) for content in rows(found)) == 4
    found = read(tmp_path, "a.jsonl", b'{"a": "caf\xe9 au lait"}\n{"a": "x"}')
    assert problem(found[0]) == (1, 11, "not-utf8")


def test_long_files_in_utf8_pass_wherever_the_head_ends(tmp_path: Path) -> None:
    for shift in range(4):
        data = [{"a": "x" * shift + "你" * 100_000}, {"a": "y"}]
        assert rows(read(tmp_path, "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in data))) == data


def pack(name: str, data: bytes) -> bytes:
    return gzip.compress(data) if name.endswith(".gz") else zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_packed_files(tmp_path: Path, packed: str) -> None:
    plain = [{"a": str(i), "b": "你好" * (i % 7)} for i in range(20_000)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain).encode()
    data = pack(packed, lines[:300_000]) + pack(packed, lines[300_000:])  # two members, as parallel packers write
    assert rows(read(tmp_path, f"a.jsonl{packed}", data)) == plain
    assert rows(read(tmp_path, f"a.json{packed}", pack(packed, json.dumps(plain).encode()))) == plain
    assert rows(read(tmp_path, f"a.csv{packed}", pack(packed, b"a,b\n1,2\n"))) == [{"a": "1", "b": "2"}]
    assert rows(read(tmp_path, f"a.tsv{packed}", pack(packed, b"a\tb\n1\t2\n"))) == [{"a": "1", "b": "2"}]
    assert rows(read(tmp_path, f"a.txt{packed}", pack(packed, b"x\n"))) == [{"text": "x"}]
    for broken in (data[:-5], data[: len(data) // 2], data[:50] + b"\0\xff" * 30 + data[110:], b"no archive"):
        with pytest.raises(DataError, match=rf"damaged {packed} file"):
            read(tmp_path, f"a.jsonl{packed}", broken)


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_decompression_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str) -> None:
    monkeypatch.setattr(stream, "BOMB_FLOOR", 1 << 19)
    data = pack(packed, b'{"a": 1}\n' * (1 << 17))
    with pytest.raises(DataError, match="unpacks to more than 524,288 bytes"):
        read(tmp_path, f"a.jsonl{packed}", data)
    monkeypatch.setattr(stream, "BOMB_FLOOR", 1 << 21)
    assert len(read(tmp_path, f"a.jsonl{packed}", data)) == 1 << 17


# ---- CSV and text


def test_csv(tmp_path: Path) -> None:
    text = '\ninstruction,output\n"a ""b""","first\nsecond"\n\nc,\n"d","e,f"\n'
    expected = [
        (3, {"instruction": 'a "b"', "output": "first\nsecond"}),
        (6, {"instruction": "c", "output": ""}),
        (7, {"instruction": "d", "output": "e,f"}),
    ]
    assert read(tmp_path, "a.csv", text) == expected
    assert read(tmp_path, "a.tsv", text.replace(",", "\t").replace("e\tf", "e,f")) == expected
    assert rows(read(tmp_path, "a.csv", "a\n" + "x" * 200_000)) == [{"a": "x" * 200_000}]
    assert read(tmp_path, "a.csv", "a,b\n") == read(tmp_path, "a.csv", "") == []


def test_bad_rows_of_a_csv(tmp_path: Path) -> None:
    data = b'a,b\n1,2\n1,2,3\n1\n"x"y,2\n"p\nq",\xff\n\0,1\n"p\nq",2\n'
    found = read(tmp_path, "a.csv", data)
    assert rows([found[0], found[6]]) == [{"a": "1", "b": "2"}, {"a": "p\nq", "b": "2"}]
    assert [problem(item) for item in found[1:6]] == [
        (3, None, "wrong-field-count"), (4, None, "wrong-field-count"), (5, None, "bad-csv"), (6, 4, "not-utf8"),
        (8, 1, "nul-character"),
    ]  # fmt: skip
    assert found[1][1].message == "3 fields, the header has 2"
    assert found[6][0] == 9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b,a\n1,2,3\n", ":1  two columns are named 'a'"),
        ('a,b\n1,2\n3,"4\n5,6\n', ":3  a quoted field of the row that begins here is never closed"),
        ('"a,b\n1,2\n', ":1  a quoted field"),
        ('"a"x,b\n1,2\n', ":1  the header cannot be read"),
    ],
)
def test_a_csv_that_cannot_be_read(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(tmp_path, "a.csv", text)


def test_text(tmp_path: Path) -> None:
    found = read(tmp_path, "a.txt", b" x \n\n\t\ny\xff\nz\0\nw")
    assert (found[0], found[3]) == ((1, {"text": " x "}), (6, {"text": "w"}))
    assert [problem(item) for item in found[1:3]] == [(4, 2, "not-utf8"), (5, 2, "nul-character")]


# ---- Parquet and Arrow


TABLE = [{"a": i, "b": None if i % 3 else [{"c": "你" * (i % 5)}], "d": i % 2 == 0} for i in range(2500)]


def write_table(path: Path, form: str) -> Path:
    table = pa.Table.from_pylist(TABLE)
    if form == "parquet":
        pq.write_table(table, path, row_group_size=700)
    else:
        make = pa.ipc.new_file if form == "file" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=1200)
    return path


@pytest.mark.parametrize(("name", "form"), [("a.parquet", "parquet"), ("a.arrow", "file"), ("b.arrow", "stream")])
def test_tables(tmp_path: Path, name: str, form: str) -> None:
    path = write_table(tmp_path / name, form)
    assert list(read_file(path)) == [(0, row) for row in TABLE]
    data = path.read_bytes()
    for broken in (data[:-30], data[: len(data) // 2], b"PAR1" + b"\0" * 50, b"x" * 100):
        with pytest.raises(DataError, match=r"cannot be read as (Parquet|Arrow)"):
            read(tmp_path, name, broken)


def test_tables_with_json_text_dates_and_twins(tmp_path: Path) -> None:
    texts = pa.array(['{"x":1}', None, '"q"'], pa.json_())
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 2, 3]), texts)
    structs = pa.StructArray.from_arrays([texts, pa.array([1, 2, 3])], ["j", "n"])
    table = pa.table({"t": texts, "l": lists, "s": structs})
    pq.write_table(table, tmp_path / "a.parquet")
    assert rows(list(read_file(tmp_path / "a.parquet"))) == [
        {"t": {"x": 1}, "l": [{"x": 1}, None], "s": {"j": {"x": 1}, "n": 1}},
        {"t": None, "l": [], "s": {"j": None, "n": 2}},
        {"t": "q", "l": ["q"], "s": {"j": "q", "n": 3}},
    ]
    pq.write_table(pa.table([[1], [2]], names=["a", "a"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="two columns are named 'a'"):
        list(read_file(tmp_path / "b.parquet"))
    late = pa.array([0, 2**50, 1], pa.timestamp("ms"))
    pq.write_table(pa.table({"t": late}), tmp_path / "c.parquet")
    found = list(read_file(tmp_path / "c.parquet"))
    assert problem(found[1]) == (0, None, "unreadable-value")
    assert [type(content) for content in rows(found)] == [dict, RowProblem, dict]


# ---- skipping, memory


def make_every_kind(folder: Path) -> list[Path]:
    plain = [{"a": str(i), "b": "x" * (i % 11)} for i in range(2500)]
    lines = "\n\n".join(json.dumps(row) if i % 100 else "broken" for i, row in enumerate(plain))
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps([row if i % 100 else 3 for i, row in enumerate(plain)], indent=1))
    table = "a,b\n" + "".join(f'{row["a"]},"{row["b"]}"\n' if i % 100 else "1\n" for i, row in enumerate(plain))
    (folder / "a.csv").write_text(table)
    (folder / "a.tsv").write_text(table.replace(",", "\t"))
    (folder / "a.txt").write_text(table)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_table(folder / "a.parquet", "parquet")
    write_table(folder / "a.arrow", "file")
    write_table(folder / "b.arrow", "stream")
    return sorted(folder.iterdir())


def plainly(items: list[Any]) -> list[Any]:
    return [(item[0], str(item[1])) if item else item for item in items]


def test_skipped_rows_are_counted_by_every_reader(tmp_path: Path) -> None:
    paths = make_every_kind(tmp_path)
    assert len(paths) == 9
    for path in paths:
        whole = plainly(list(read_file(path)))
        assert len(whole) in (2500, 2501)
        for skip in (1, 699, 700, 1300, len(whole) - 1, len(whole), len(whole) + 5):
            assert plainly(list(read_file(path, skip))) == [None] * min(skip, len(whole)) + whole[skip:], (path, skip)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt", "jsonl.gz", "jsonl.zst"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, kind: str) -> None:
    def peak(count: int) -> int:
        words = [f"{i * 2654435761 % 2**32:x} " * 6 for i in range(count)]
        lines = [f'"{word}"' if kind == "csv" else json.dumps({"a": word}) for word in words]
        text = f"[{','.join(lines)}]" if kind == "json" else "a\n" * (kind == "csv") + "\n".join(lines)
        path = tmp_path / f"{count}.{kind}"
        path.write_bytes(pack(kind, text.encode()) if "." in kind else text.encode())
        for _ in read_file(path):  # what is imported or compiled once is no part of it
            break
        tracemalloc.start()
        assert sum(1 for _ in read_file(path)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(40_000) < 1.5 * peak(12_000)


# ---- which files


def test_folders(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.jsonl.gz", ".hidden.csv", "README.md", "LICENSE", "LICENSE.txt", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in folder_files(tmp_path)] == ["a.json", "b.jsonl", "c.jsonl.gz"]
    (tmp_path / "d.csv").write_text("a\n1")
    with pytest.raises(DataError, match=r"several kinds: CSV \(d\.csv\), JSON \(a\.json\)"):
        folder_files(tmp_path)
    (tmp_path / "e.pkl").write_text("")
    with pytest.raises(DataError, match=r"files that are not read \(e\.pkl\); read are \.json"):
        folder_files(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match=r"holds folders \(train\)"):
        folder_files(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        folder_files(tmp_path / "empty")


@pytest.mark.parametrize("name", ["a.pkl", "a", "a.parquet.gz", "a.arrow.zst", "a.gz", ".jsonl"])
def test_endings_that_are_not_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"are not read; read are \.json"):
        read(tmp_path, name, "{}")


def test_depth_is_a_stated_limit() -> None:
    row = b'{"a": ' + b"[" * (json_parse.MAX_DEPTH - 1) + b"]" * (json_parse.MAX_DEPTH - 1) + b"}"
    assert parse_row(row)
