"""The end of a run in a few lines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tunesmith.model.files import VALUE_HEAD
from tunesmith.train.checkpoint import list_checkpoints
from tunesmith.train.progress import printable
from tunesmith.train.runfiles import ANSWERS, LOSS_PLOT, read_results
from tunesmith.train.runlog import LOG_NAME, read_log

_ANSWERS_SHOWN = 5


def summarize(run: Path) -> Iterator[str]:
    """What came out, where it lies, and what to type next."""
    results = read_results(run)
    entries = read_log(run)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    evaluations = [(entry["current_steps"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    yield ""
    yield f"finished: {results['steps']} updates, {results['epochs']:.2f} epochs, {_duration(results['seconds'])}"
    if losses:
        yield f"  loss        {losses[0]:.4f} -> {losses[-1]:.4f}"
    if evaluations:
        yield f"  eval loss   {evaluations[0][1]:.4f} -> {evaluations[-1][1]:.4f}"
        perplexities = [entry["eval_perplexity"] for entry in entries if "eval_perplexity" in entry]
        if perplexities:
            yield f"  perplexity  {perplexities[0]:.2f} -> {perplexities[-1]:.2f}"
    yield from _rewards(run, entries)
    best = results.get("best_eval_loss", results.get("best_eval_reward"))
    if results["best_step"] is not None and best is not None:
        kept = ", kept" if results["loaded_best"] else ""
        yield f"  best        {best:.4f} at step {results['best_step']}{kept}"
    yield f"  result      {run}"
    yield f"  log         {run / LOG_NAME}"
    if (run / LOSS_PLOT).is_file():
        yield f"  curve       {run / LOSS_PLOT}"
    if checkpoints := list_checkpoints(run):
        yield f"  checkpoints {', '.join(path.name for path in checkpoints)}"
    if (run / VALUE_HEAD).is_file():
        yield f"it scores:   tunesmith predict {run} FILE"
    else:
        yield f"talk to it:  tunesmith chat {run}"


def _rewards(run: Path, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Of a policy: how its rewards went, and some of its answers."""
    for key, name in (("reward", "reward     "), ("eval_reward", "eval reward")):
        if found := [entry[key] for entry in entries if key in entry]:
            yield f"  {name} {found[0]:.4f} -> {found[-1]:.4f}"
    if not (run / ANSWERS).is_file():
        return
    with (run / ANSWERS).open(encoding="utf-8") as file:
        answers = [json.loads(line) for line in islice(file, _ANSWERS_SHOWN)]
    yield "  reward  answers to the first evaluation prompts"
    for answer in answers:
        yield f"  {answer['reward']:6.3f}  {_short(answer['prompt'], 40)} -> {_short(answer['response'], 70)}"


def _short(text: str, most: int) -> str:
    """In one line, printable, cut off with a sign."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
