"""What a page of several runs shows, also while they are under way."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.report.page import Chapter, key_numbers, samples, write_page


def run(folder: Path, log: list[dict[str, Any]], answers: Sequence[tuple[str, str, str]] = ()) -> Chapter:
    folder.mkdir()
    lines = [json.dumps({"current_steps": i, "total_steps": 9, **entry}) for i, entry in enumerate(log)]
    (folder / "trainer_log.jsonl").write_text("\n".join([*lines, '{"current_steps": 9, "lo']), encoding="utf-8")
    said = [json.dumps({"when": when, "prompt": prompt, "answer": answer}) for when, prompt, answer in answers]
    (folder / "samples.jsonl").write_text("\n".join(said), encoding="utf-8")
    return Chapter(folder.name, "stage sft", folder, f"tunesmith chat {folder}")


def test_first_and_last_of_what_is_measured() -> None:
    log = [{"eval_loss": 3.0, "epoch": 0}, {"loss": 2.0, "grad_norm": None, "learning_rate": 1}, {"loss": 1.5, "kl": 0.1}]
    assert key_numbers(log) == {"eval_loss": (3.0, 3.0), "loss": (2.0, 1.5), "kl": (0.1, 0.1)}


def test_the_page_follows_a_question_through_the_stages(tmp_path: Path) -> None:
    one = run(tmp_path / "one", [{"loss": 2.0}, {"loss": 1.0}], [("before", "Q&A?", "<a>"), ("after", "Q&A?", "b")])
    two = run(tmp_path / "two", [{"loss": 1.0}], [("before", "Q&A?", "b"), ("after", "Q&A?", "c")])
    three = Chapter("three", "stage rm", tmp_path / "three", "")
    assert samples(one.run) == [("Q&A?", "<a>", "b")]
    page = write_page("all <stages>", [one, two, three], tmp_path).read_text(encoding="utf-8")
    assert "<h1>all &lt;stages&gt;</h1>" in page and "<a>" not in page
    assert "<th>at first</th><th>after one</th><th>after two</th>" in page
    assert "<td>Q&amp;A?</td><td>&lt;a&gt;</td><td>b</td><td>c</td>" in page
    assert "stage rm; not begun" in page and "stage sft; begun" in page
    assert "tunesmith chat" not in page
    (one.run / "train_results.json").write_text('{"steps": 1200, "seconds": 90}')
    page = write_page("all", [one, two, three], tmp_path).read_text(encoding="utf-8")
    assert f"<pre>tunesmith chat {one.run}</pre>" in page and "1,200 updates in 1.5 min" in page
