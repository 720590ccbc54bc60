from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_rows, write_dataset
from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.registry import load_attrs, parse_entry
from tunesmith.errors import DataError

MEDIA = {
    "mllm_demo", "mllm_audio_demo", "mllm_video_demo", "mllm_video_audio_demo", "llava_1k_en", "llava_1k_zh", "llava_150k_en",
    "llava_150k_zh", "pokemon_cap", "mllm_pt_demo", "rlhf_v", "vlfeedback", "rlaif_v",
}  # fmt: skip


def parse(entry: Any, folder: str = "data") -> DatasetAttr:
    return parse_entry("d", entry, Path(folder) / "dataset_info.json")


def test_every_entry_of_the_ecosystems_own_registry(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    path = shared / "data" / "demo" / "dataset_info.json"
    registry = json.loads(path.read_text(encoding="utf-8"))
    refused = set()
    for name, entry in registry.items():
        try:
            attr = parse_entry(name, entry, path)
        except DataError as error:
            assert "not text" in str(error)
            refused.add(name)
            continue
        assert attr.ranking is entry.get("ranking", False)
        assert attr.split == entry.get("split", "train")
        assert (attr.subset, attr.folder) == (entry.get("subset"), entry.get("folder"))
        if "file_name" in entry:
            assert (attr.load_from, attr.file_name) == ("file", entry["file_name"])
        else:
            assert attr.hub_url == entry.get("hf_hub_url", entry.get("ms_hub_url"))
            assert attr.load_from == ("hf_hub" if "hf_hub_url" in entry else "ms_hub")
        for column, value in entry.get("columns", {}).items():
            assert getattr(attr, f"{column}_column") == value
        for tag, value in entry.get("tags", {}).items():
            assert getattr(attr, tag) == value
    assert refused == MEDIA
    assert len(registry) == 104


def test_all_keys_arrive() -> None:
    attr = parse(
        {
            "hf_hub_url": "org/name",
            "revision": "v1",
            "subset": "en",
            "split": "test",
            "folder": "python",
            "num_samples": 7,
            "file_sha1": "a" * 40,
            "dataset_sha256": "b" * 64,
            "source_prefix": "p",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "m", "tools": "t", "chosen": "c", "rejected": "r", "system": "s", "kto_tag": None},
            "tags": {"role_tag": "a", "content_tag": "b", "user_tag": "c", "assistant_tag": "d", "observation_tag": "e",
                     "function_tag": "f", "system_tag": "g"},
        }
    )  # fmt: skip
    assert attr == DatasetAttr(
        dataset_name="d", load_from="hf_hub", hub_url="org/name", revision="v1", subset="en", split="test", folder="python",
        num_samples=7, dataset_sha1="a" * 40, dataset_sha256="b" * 64, source_prefix="p", formatting="sharegpt", ranking=True,
        prompt_column=None, query_column=None, response_column=None, messages_column="m", tools_column="t", chosen_column="c",
        rejected_column="r", system_column="s", role_tag="a", content_tag="b", user_tag="c", assistant_tag="d",
        observation_tag="e", function_tag="f", system_tag="g",
    )  # fmt: skip


def test_naming_a_column_unsets_the_others_as_elsewhere() -> None:
    attr = parse({"file_name": "a", "columns": {"prompt": "q", "response": "a"}})
    assert (attr.prompt_column, attr.query_column, attr.response_column, attr.messages_column) == ("q", None, "a", None)


def test_defaults_fit_the_formatting() -> None:
    attr = parse({"file_name": "a", "formatting": "openai"})
    assert (attr.messages_column, attr.tools_column, attr.role_tag, attr.content_tag) == (
        "messages",
        "tools",
        "role",
        "content",
    )
    assert (attr.user_tag, attr.assistant_tag, attr.observation_tag, attr.system_tag) == ("user", "assistant", "tool", "system")
    assert parse({"file_name": "a", "formatting": "openai", "columns": {"messages": "m"}}).tools_column is None
    assert parse({"file_name": "a", "formatting": "text"}).prompt_column == "text"
    attr = parse({"file_name": "a"})
    assert (attr.formatting, attr.prompt_column, attr.response_column) == ("alpaca", "instruction", "output")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"file_name": "a", "formating": "alpaca"}, "unknown key 'formating'; did you mean 'formatting'"),
        ({"file_name": "a", "zzz": 1}, "unknown key 'zzz'; Understood: file_name"),
        ({"file_name": "a", "formatting": "csv"}, "formatting"),
        ({"file_name": "a", "formatting": ["alpaca"]}, "formatting"),
        ({"file_name": "a", "ranking": "maybe"}, "ranking"),
        ({"file_name": "a", "columns": {"images": "i"}}, "images are not text"),
        ({"file_name": "a", "columns": {"promt": "i"}}, "unknown column 'promt'; did you mean 'prompt'"),
        ({"file_name": "a", "columns": {"prompt": 3}}, "prompt_column"),
        ({"file_name": "a", "tags": {"role": "r"}}, "unknown tag 'role'; did you mean 'role_tag'"),
        ({"file_name": "a", "num_samples": 0}, "num_samples"),
        ({"file_name": "a", "file_sha1": "abc"}, "dataset_sha1"),
        ({"file_name": "a", "file_sha1": "a" * 40, "dataset_sha1": "b" * 40}, "dataset_sha1 differ"),
        ({"file_name": 3}, "file_name: expected a path"),
        ({"hf_hub_url": "../../x"}, "hf_hub_url: expected org/name"),
        ({"hf_hub_url": "a/b/c"}, "hf_hub_url: expected org/name"),
        ({"om_hub_url": "HaM/x"}, "om_hub_url: sets of the Modelers hub"),
        ({"script_url": "evil.py"}, "script_url: .* never run"),
        ({"script_url": "evil.py", "file_name": "a.json"}, "script_url: .* never run"),
        ({"cloud_file_name": "s3://b/x.json"}, "cloud_file_name: cloud storage is not read"),
        ({}, "names no data; give file_name"),
        ("text", "expected an object"),
        ({"file_name": "a", "columns": 3}, "columns must be an object"),
        ({"file_name": "a", "tags": []}, "tags must be an object"),
    ],
)
def test_entries_are_checked(entry: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"dataset_info\.json: 'd'.*{said}"):
        parse(entry)


@pytest.mark.parametrize(
    "name",
    ["../../../etc/passwd", "a/../../b.json", "/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:9/x.json", "C:\\x.json",
     "..\\x.json", "\\\\host\\x.json", "a\0.json"],
)  # fmt: skip
@pytest.mark.parametrize("other", [{}, {"hf_hub_url": "org/name"}])
def test_d1_names_that_leave_the_folder(name: str, other: dict[str, str]) -> None:
    with pytest.raises(DataError, match="leaves dataset_dir"):
        parse({"file_name": name, **other})


def test_file_before_hub_if_it_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USE_MODELSCOPE_HUB", raising=False)
    entry = {"file_name": "a.json", "hf_hub_url": "org/hf", "ms_hub_url": "org/ms", "om_hub_url": "org/om"}
    assert parse(entry, str(tmp_path)).hub_url == "org/hf"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "1")
    attr = parse(entry, str(tmp_path))
    assert (attr.load_from, attr.hub_url) == ("ms_hub", "org/ms")
    assert parse({"hf_hub_url": "org/hf"}).load_from == "hf_hub"
    monkeypatch.setenv("USE_MODELSCOPE_HUB", "0")
    assert parse({"ms_hub_url": "org/ms"}).load_from == "ms_hub"
    (tmp_path / "a.json").write_text("[]")
    attr = parse(entry, str(tmp_path))
    assert (attr.load_from, attr.file_name, attr.hub_url) == ("file", "a.json", None)


def test_names_are_looked_up(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, make_rows(1))
    attr = load_attrs(str(folder), ("rows",))[0]
    assert (attr.prompt_column, attr.inline, attr.formatting) == ("instruction", False, "alpaca")
    with pytest.raises(DataError, match="no such entry; did you mean 'rows'"):
        load_attrs(str(folder), ("row",))
    with pytest.raises(DataError, match="no such entry; it lists: rows"):
        load_attrs(str(folder), ("zzz",))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{\n bad", r"dataset_info\.json:2:2"),
        ("[]", "expected one object"),
        ('{"rows": {"file_name": "a"}, "rows": {"file_name": "b"}}', "'rows' stands twice"),
        ("[" * 100_000, "cannot be read"),
        (b"\xff\xfe{\0", "cannot be read"),
    ],
)
def test_a_registry_that_cannot_be_read(tmp_path: Path, text: str | bytes, said: str) -> None:
    (tmp_path / "dataset_info.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=said):
        load_attrs(str(tmp_path), ("rows",))


def test_paths_need_no_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.jsonl").write_text("{}")
    (tmp_path / "set").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "./my.jsonl", str(tmp_path / "my.jsonl"), "./set", str(tmp_path / "set")):
        (attr,) = load_attrs(str(tmp_path / "nowhere"), (name,))
        assert attr == DatasetAttr(dataset_name=name, file_name=name, inline=True, formatting="auto")
    with pytest.raises(DataError, match=r"'my2\.jsonl': no such file or folder, and there is no .*dataset_info\.json"):
        load_attrs(str(tmp_path / "nowhere"), ("my2.jsonl",))
    with pytest.raises(DataError, match=r"'set': no path, no hub name.*write \./set"):
        load_attrs(str(tmp_path / "nowhere"), ("set",))


def test_an_entry_wins_over_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text("{}")
    (tmp_path / "dataset_info.json").write_text('{"my.jsonl": {"file_name": "other.jsonl"}}')
    assert load_attrs(".", ("my.jsonl",))[0].file_name == "other.jsonl"


def test_hub_names(tmp_path: Path) -> None:
    hf, ms = load_attrs(str(tmp_path), ("hf:org/name@v1.0", "ms:org/name"))
    assert (hf.load_from, hf.hub_url, hf.revision, hf.formatting) == ("hf_hub", "org/name", "v1.0", "auto")
    assert (ms.load_from, ms.hub_url, ms.revision) == ("ms_hub", "org/name", None)
    for name in ("hf:", "hf:a/b/c", "hf:../x", "hf:a/..", "hf:org/name@", "hf:http://127.0.0.1/x"):
        with pytest.raises(DataError, match="expected hf:org/name"):
            load_attrs(str(tmp_path), (name,))


def test_one_prefix_for_all_or_one_each(tmp_path: Path) -> None:
    write_dataset(tmp_path, make_rows(1), "a", source_prefix="own")
    write_dataset(tmp_path, make_rows(1), "b")
    assert [x.source_prefix for x in load_attrs(str(tmp_path), ("a", "b"))] == ["own", ""]
    assert [x.source_prefix for x in load_attrs(str(tmp_path), ("a", "b"), "p ")] == ["p ", "p "]
    assert [x.source_prefix for x in load_attrs(str(tmp_path), ("a", "b"), "p|q")] == ["p", "q"]
    with pytest.raises(DataError, match="3 prefixes for 2 data sets"):
        load_attrs(str(tmp_path), ("a", "b"), "p|q|r")
