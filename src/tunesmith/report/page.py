"""Several run folders on one page: ``pipeline.html``, which needs nothing beside itself, and ``pipeline.png``."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.report.plot import draw_panel, panels
from tunesmith.train.runfiles import LOSS_PLOT, SAMPLES, is_finished, read_results
from tunesmith.train.runlog import read_log

PAGE = "pipeline.html"
PICTURE = "pipeline.png"
_CLOCK = frozenset({
    "current_steps", "total_steps", "epoch", "percentage", "elapsed_time", "remaining_time", "learning_rate", "grad_norm",
    "num_tokens", "step_seconds", "tokens_per_second",
})  # fmt: skip
"""Keys of a log line that say where a run is, and not what comes of it."""


class Chapter(NamedTuple):
    """A run on the page.

    Attributes:
        title: its name there.
        kind: its stage, in words.
        run: its folder; nothing need be in it yet.
        hint: a command to go on with; empty without one.
    """

    title: str
    kind: str
    run: Path
    hint: str


def write_page(title: str, chapters: Sequence[Chapter], folder: Path) -> Path:
    """Write the page and the picture of these runs into ``folder``, as far as they have come.

    Returns:
        Path of the page.
    """
    drawn = draw_overview(chapters, folder / PICTURE)
    body = "\n".join([*_through(chapters), *(line for chapter in chapters for line in _chapter(chapter))])
    picture = _picture(folder / PICTURE, "curves of all stages") if drawn else ""
    page = _PAGE.format(title=html.escape(title), picture=picture, body=body)
    target, scratch = folder / PAGE, folder / f".{PAGE}.partial"
    scratch.write_text(page, encoding="utf-8")
    scratch.replace(target)
    return target


def draw_overview(chapters: Sequence[Chapter], target: Path) -> bool:
    """Draw what the logs have to show (see ``panels``), a column for each run; False where nothing is logged yet."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = [(chapter, panels(entries)) for chapter in chapters if (entries := read_log(chapter.run))]
    columns = [(chapter, drawn) for chapter, drawn in columns if drawn[0].training]
    if not columns:
        return False
    rows = max(len(drawn) for _, drawn in columns)
    size = (4.5 * len(columns), 3.2 + 2.2 * (rows - 1))
    figure, axes = plt.subplots(rows, len(columns), figsize=size, squeeze=False)
    for column, (chapter, drawn) in enumerate(columns):
        for row in range(rows):
            if row < len(drawn):
                draw_panel(axes[row][column], drawn[row])
            else:
                axes[row][column].set_axis_off()
        axes[0][column].set_title(chapter.title)
        axes[len(drawn) - 1][column].set_xlabel("update")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return True


def key_numbers(entries: Sequence[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """First and last value of everything that a log measures.

    Example:
        ``[{"loss": 2.0, "epoch": 1}, {"loss": 1.5}]`` -> ``{"loss": (2.0, 1.5)}``.
    """
    found: dict[str, tuple[float, float]] = {}
    for entry in entries:
        for key, value in entry.items():
            if key not in _CLOCK and isinstance(value, int | float) and not isinstance(value, bool):
                found[key] = (found.get(key, (value, value))[0], value)
    return found


def samples(run: Path) -> list[tuple[str, str, str]]:
    """(question, answer before, answer after) of a run; an answer that is not there yet is empty."""
    try:
        lines = (run / SAMPLES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    answers: dict[str, dict[str, str]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # cut short by a crash
            continue
        answers.setdefault(entry["prompt"], {})[entry["when"]] = entry["answer"]
    return [(prompt, said.get("before", ""), said.get("after", "")) for prompt, said in answers.items()]


# ---- HTML


def _through(chapters: Sequence[Chapter]) -> Iterator[str]:
    """The answers to each question from stage to stage, where more than one stage was asked."""
    asked = [(chapter.title, found) for chapter in chapters if (found := samples(chapter.run))]
    if len(asked) < 2:
        return
    questions = dict.fromkeys(question for _, found in asked for question, _, _ in found)
    said = [{question: after for question, _, after in found} for _, found in asked]
    first = {question: before for _, found in reversed(asked) for question, before, _ in found}
    rows = [(question, first[question], *(after.get(question, "") for after in said)) for question in questions]
    yield from _table(["question", "at first", *(f"after {title}" for title, _ in asked)], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"<table><tr>{''.join(f'<th>{html.escape(head)}</th>' for head in heads)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>"
    yield "</table>"


def _chapter(chapter: Chapter) -> Iterator[str]:
    yield f"<section>\n<h2>{html.escape(chapter.title)}</h2>"
    yield f"<p>{html.escape(chapter.kind)}; {_state(chapter.run)}; <code>{html.escape(str(chapter.run))}</code></p>"
    if numbers := key_numbers(read_log(chapter.run)):
        yield from _table(["", "first", "last"], [(key, f"{a:.4g}", f"{b:.4g}") for key, (a, b) in numbers.items()])
    if (chapter.run / LOSS_PLOT).is_file():
        yield _picture(chapter.run / LOSS_PLOT, f"curves of {chapter.title}")
    if answers := samples(chapter.run):
        yield from _table(["question", "before", "after"], answers)
    if chapter.hint and is_finished(chapter.run):
        yield f"<pre>{html.escape(chapter.hint)}</pre>"
    yield "</section>"


def _state(run: Path) -> str:
    if not is_finished(run):
        return "begun" if read_log(run) else "not begun"
    results = read_results(run)
    return f"{results['steps']:,} updates in {results['seconds'] / 60:.1f} min"


def _picture(path: Path, label: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(label)}" src="data:image/png;base64,{data}">'


_PAGE = """<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222; }}
table {{ border-collapse: collapse; margin: 1em 0; }}
td, th {{ border: 1px solid #ccc; padding: .3em .7em; text-align: left; vertical-align: top; overflow-wrap: anywhere; }}
img {{ max-width: 100%; }}
pre, code {{ background: #f3f3f3; padding: .2em .4em; }}
section {{ border-top: 1px solid #ccc; margin-top: 2em; }}
</style>
</head>
<body>
<h1>{title}</h1>
{picture}
{body}
</body>
</html>
"""
