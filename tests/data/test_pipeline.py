"""From a file to its store: cached by content, resumable, the same with workers, flat in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.conftest import SHARED, make_rows, tunesmith, write_dataset
from tunesmith.config.arguments import DataArguments, DatasetAttr
from tunesmith.data import pipeline
from tunesmith.data.objective import Objective
from tunesmith.data.pipeline import Place, Recipe, tokenised
from tunesmith.data.prepare import make_recipe
from tunesmith.data.store import TokenSet, partial
from tunesmith.data.tokenize import LOST
from tunesmith.errors import DataError, TemplateError

DIALOGUES = Recipe("conversation", 512, "keep_end", None, {"name": None, "author": None}, None)
TEXTS = Recipe("document", 512, "keep_end", None, {}, None)


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return tokenizer


def attr(name: str = "rows.jsonl", **values: Any) -> DatasetAttr:
    return DatasetAttr(dataset_name="rows", file_name=name, **values)


def content(store: TokenSet) -> list[tuple[list[int], list[int], int]]:
    return [(e.input_ids.tolist(), e.labels.tolist(), e.source.row) for e in store]


def test_the_second_time_nothing_is_tokenised(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "data", make_rows(50))
    place = Place(tmp_path / "cache")
    first = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, place)
    monkeypatch.setattr(pipeline, "_write", lambda *_: pytest.fail("tokenised again"))
    again = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, place)
    assert content(again) == content(first)
    assert again.progress.report.to_dict() == first.progress.report.to_dict()


@pytest.mark.parametrize(
    "change", ["data", "template", "cutoff", "limit", "column", "system", "special", "thinking", "history", "prompt"]
)
def test_whatever_matters_makes_another_store(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, change: str) -> None:
    folder = write_dataset(tmp_path / "data", make_rows(20))
    place = Place(tmp_path / "cache")
    if change == "thinking":
        tokenizer.chat_template += "{% if enable_thinking %}{% endif %}"
    tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, place)
    recipe, given, limit = DIALOGUES, attr(), None
    if change == "data":
        file = folder / "rows.jsonl"
        stat = file.stat()
        text = file.read_text()
        file.write_text(text.replace("cat", "mat", 1))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "template":
        tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")
    elif change == "cutoff":
        recipe = Recipe(**{**DIALOGUES.__dict__, "cutoff_len": 100})
    elif change == "limit":
        limit = 10
    elif change == "column":
        given = attr(source_prefix="> ")
    elif change == "system":
        recipe = Recipe(**{**DIALOGUES.__dict__, "default_system": "be"})
    elif change == "thinking":
        recipe = replace(DIALOGUES, options={"enable_thinking": False})
    elif change in ("history", "prompt"):
        recipe = replace(DIALOGUES, objective=Objective(change == "history", change == "prompt"))
    else:
        tokenizer.eos_token = "<|endoftext|>"
    tokenised(given, str(folder), limit, recipe, tokenizer, place)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 2


def test_what_the_template_never_looks_at_makes_no_other_store(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", make_rows(5))
    for recipe in (DIALOGUES, replace(DIALOGUES, options={"enable_thinking": False}, date="2026-01-02")):
        tokenised(attr(), str(folder), None, recipe, tokenizer, Place(tmp_path / "cache"))
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_workers_and_threads_write_the_same_bytes(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 16)
    folder = write_dataset(tmp_path / "data", make_rows(100))
    one = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "one"))
    many = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "many", workers=2))
    assert one.digest == many.digest
    assert content(one) == content(many)


def test_a_stopped_one_goes_on(tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 10)
    folder = write_dataset(tmp_path / "data", make_rows(95))
    whole = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "whole"))
    finish = pipeline.ChunkMaker.finish
    done = [0]

    def breaking(self: pipeline.ChunkMaker, rendered: Any) -> Any:
        done[0] += 1
        if done[0] == 5:
            raise KeyboardInterrupt
        return finish(self, rendered)

    monkeypatch.setattr(pipeline.ChunkMaker, "finish", breaking)
    with pytest.raises(KeyboardInterrupt):
        tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "cut"))
    done[0] = 100
    resumed = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "cut"))
    assert done[0] == 106  # four of ten chunks were kept
    assert resumed.digest == whole.digest
    assert resumed.progress.report.to_dict() == whole.progress.report.to_dict()


def test_killed_and_started_again(tiny_model: Path, tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "data", make_rows(30_000))
    cache = tmp_path / "cache"
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"model_name_or_path": str(tiny_model), "dataset": "rows", "dataset_dir": str(folder), "output_dir": "x",
                                  "tokenized_path": str(cache)}))  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "tunesmith", "check", str(config), "--json"], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        journals = list(cache.glob("*.partial/journal.jsonl"))
        if journals and journals[0].read_bytes().count(b"\n") >= 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    kept = json.loads(next(iter(cache.glob("*.partial/journal.jsonl"))).read_text().splitlines()[-1])["rows"]
    assert 5 * pipeline.CHUNK <= kept < 30_000
    result = json.loads(tunesmith("check", config, "--json", check=False).stdout)
    assert result["counts"]["rows"]["kept"] == 30_000
    (store,) = [p for p in cache.iterdir() if p.is_dir()]
    rows = [json.loads(line)["rows"] for line in (store / "journal.jsonl").read_text().splitlines()]
    assert rows == sorted(rows)
    assert rows[-1] == 30_000


def test_memory_does_not_grow_with_the_rows(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    peaks = []
    for count in (4000, 16_000):
        folder = write_dataset(tmp_path / str(count), make_rows(count))
        tracemalloc.start()
        tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "cache"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]


def test_a_full_disk_says_so_and_what_is_written_counts(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "data", make_rows(50))
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    target = tmp_path / "cache"
    monkeypatch.setattr(pipeline, "CHUNK", 10)
    opened = pipeline.StoreWriter._open
    monkeypatch.setattr(
        pipeline.StoreWriter, "_open", lambda self, name: full.open("ab") if name == "ids" else opened(self, name)
    )
    with pytest.raises(DataError, match=r"No space left.*tokenized_path"):
        tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(target))
    monkeypatch.setattr(pipeline.StoreWriter, "_open", opened)
    assert len(tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(target))) == 50


def test_a_large_set_with_rows_that_end_the_run_is_given_up_early(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "CHUNK", 10)
    monkeypatch.setattr(pipeline, "_PATIENCE", 30)
    folder = write_dataset(tmp_path / "data", make_rows(200))
    text = (folder / "rows.jsonl").read_text().splitlines()
    text[15] = "{broken"
    (folder / "rows.jsonl").write_text("\n".join(text))
    with pytest.raises(DataError, match=r"1 of 30 rows.*\n.*rows\.jsonl:16"):
        tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "cache", policy="auto"))
    assert len(tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "cache", policy="drop"))) == 199
    assert not list((tmp_path / "cache").glob("*.partial"))


# ---- documents


def test_documents_are_opened_and_closed(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    texts = ["the cat sat", "on a mat 你好", "one <|im_end|> two"]
    folder = write_dataset(tmp_path / "data", [{"text": text} for text in texts])
    given = attr(formatting="text", prompt_column="text")
    store = tokenised(given, str(folder), None, TEXTS, tokenizer, Place(tmp_path / "cache"))
    end = tokenizer.eos_token_id
    assert [e.input_ids.tolist() for e in store][:2] == [[*tokenizer(text)["input_ids"], end] for text in texts[:2]]
    assert store[2].input_ids.tolist().count(end) == 1
    assert tokenizer.decode(store[2].input_ids[:-1]) == texts[2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder, which is absent")
def test_documents_open_as_the_tokenizer_opens_texts(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    folder = write_dataset(tmp_path / "data", [{"text": "Once upon a time"}])
    store = tokenised(
        attr(formatting="text", prompt_column="text"), str(folder), None, TEXTS, tokenizer, Place(tmp_path / "cache")
    )
    assert store[0].input_ids.tolist() == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]


def test_no_end_token_is_an_error(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.eos_token = None
    folder = write_dataset(tmp_path / "data", [{"text": "a"}])
    with pytest.raises(TemplateError, match="no end-of-sequence"):
        tokenised(attr(formatting="text", prompt_column="text"), str(folder), None, TEXTS, tokenizer, Place(tmp_path / "cache"))


# ---- through the configuration


def test_sets_are_mixed_as_asked(settings: dict[str, Any], write_config: Any) -> None:
    folder = Path(settings["dataset_dir"])
    write_dataset(folder, make_rows(4, 1), "a")
    write_dataset(folder, make_rows(6, 2), "b")

    def order(**values: Any) -> list[str]:
        done = tunesmith("preview", write_config({**settings, "dataset": "b,a", **values}), "--rows", 30, "--json")
        return [e["source"].split("/")[-1].split(".")[0] for e in json.loads(done.stdout)["examples"]]

    assert order() == ["b"] * 6 + ["a"] * 4
    assert order(max_samples=2) == ["b", "b", "a", "a"]
    assert order(mix_strategy="interleave_under") == ["b", "a"] * 4
    assert order(mix_strategy="interleave_over") == (["b", "a"] * 6)[:-1]  # ends with the last row of b
    done = tunesmith("preview", write_config({**settings, "interleave_probs": "0.5,0.5"}), check=False)
    assert "has no meaning with mix_strategy: concat" in done.stderr


def test_a_declared_column_that_no_row_has_is_an_error(settings: dict[str, Any], write_config: Any) -> None:
    rows = [{"instruction": "a", "context": "b", "output": "c"}]
    columns = {"prompt": "instruction", "query": "contxt", "response": "output"}
    write_dataset(Path(settings["dataset_dir"]), rows, "wrong", columns=columns)
    done = tunesmith("preview", write_config({**settings, "dataset": "wrong"}), check=False)
    assert "no row has the column 'contxt'" in done.stderr


def test_the_recipe_is_made_of_the_settings() -> None:
    recipe = make_recipe(DataArguments(cutoff_len=9, truncation="drop", identity_name="M"), "conversation")
    assert recipe == Recipe("conversation", 9, "drop", None, {"name": "M", "author": None}, None)
    assert partial(Path("a/b")) == Path("a/b.partial")


def test_a_cache_that_cannot_be_written_is_named_and_a_whole_store_needs_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_dataset(tmp_path / "data", make_rows(5))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file.*cannot be written.*tokenized_path"):
        tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, Place(tmp_path / "file"))
    place = Place(tmp_path / "cache")
    made = tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, place)
    monkeypatch.setattr(pipeline, "alone", lambda _: pytest.fail("locked, so written to"))
    assert content(tokenised(attr(), str(folder), None, DIALOGUES, tokenizer, place)) == content(made)


@pytest.mark.parametrize("recipe", [DIALOGUES, TEXTS])
def test_text_that_the_tokenizer_cannot_say_is_remarked_on(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, recipe: Recipe
) -> None:
    said = [{"instruction": text, "output": "sat"} for text in ("the cat", "the 喵")]
    folder = write_dataset(tmp_path / "data", said)
    declared = attr(formatting="text", prompt_column="instruction") if recipe is TEXTS else attr()
    lossless = tokenised(declared, str(folder), None, recipe, tokenizer, Place(tmp_path / "cache"))
    assert not lossless.progress.report.of("note")
    tokenizer.backend_tokenizer.normalizer = Replace("喵", "")
    lossy = tokenised(declared, str(folder), None, recipe, tokenizer, Place(tmp_path / "cache"))
    (finding,) = lossy.progress.report.of("note")
    assert (finding.message, [source.row for source, _ in finding.rows]) == (LOST, [2])
