"""The findings of a check, for a person: in the terminal and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.check.data_check import Checked
from tunesmith.errors import DataError

_BARS = " ▁▂▃▄▅▆▇█"
_LISTED = 10


def sentences(checked: Checked) -> Iterator[str]:
    """What was found, line by line."""
    yield from (f"note: {note}" for note in checked.notes)
    for name, counts in checked.counts.items():
        repeated = f", {counts['duplicate']:,} repeated" if "duplicate" in counts else ""
        yield (
            f"{name}: {counts['read']:,} rows read, {counts['kept']:,} kept, {counts['dropped']:,} cannot be trained on, "
            f"{counts['truncated']:,} longer than cutoff_len{repeated}"
        )
    yield from _entries("error", checked.errors)
    yield from _entries("warning", checked.warnings)
    if checked.lengths:
        yield from _histogram(checked.lengths)
    plan = checked.plan
    if plan and "updates_per_epoch" not in plan:
        yield (
            f"plan: {plan['updates']:,} updates; once through the sets are {plan['train_examples']:,} examples with "
            f"{plan['tokens_per_epoch']:,} tokens, {plan['supervised_share']:.0%} of them learned"
        )
    elif "answers_per_rollout" in plan:
        yield (
            f"plan: {plan['updates']:,} updates ({plan['updates_per_epoch']:,} an epoch of {plan['prompts']:,} prompts); "
            f"rollouts of {plan['answers_per_rollout']:,} answers of up to {plan['longest_answer']:,} tokens, "
            f"{plan['updates_per_rollout']:,} updates with each; {plan['eval_examples']:,} prompts to evaluate on"
        )
    elif plan:
        yield (
            f"plan: {plan['updates']:,} updates ({plan['updates_per_epoch']:,} an epoch), {plan['tokens']:,} tokens, "
            f"{plan['supervised_share']:.0%} of them learned; {plan['eval_examples']:,} examples to evaluate on"
        )
    if checked.memory:
        yield checked.memory
    yield f"{len(checked.errors):,} errors, {len(checked.warnings):,} warnings"


def _entries(kind: str, entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries[:_LISTED]:
        place = ":".join(str(entry[key]) for key in ("file", "line", "column") if entry[key] is not None)
        yield f"{kind}: {place + '  ' if place else ''}{entry['message']}{'. ' + entry['fix'] if entry['fix'] else ''}"
    if len(entries) > _LISTED:
        codes = Counter(entry["code"] for entry in entries[_LISTED:])
        rest = ", ".join(f"{count:,} {code}" for code, count in codes.most_common())
        yield f"{kind}: and {len(entries) - _LISTED:,} more ({rest}); --json lists them all"


def _histogram(lengths: dict[str, Any]) -> Iterator[str]:
    bins = lengths["histogram"]
    highest = max(b["count"] for b in bins)
    bar = "".join(_BARS[-(-b["count"] * 8 // highest)] for b in bins)
    yield (
        f"tokens: {lengths['min']} to {lengths['max']}, median {lengths['median']:g}, mean {lengths['mean']:g}, "
        f"95% at most {lengths['p95']:g}"
    )
    yield f"  {bins[0]['from']} |{bar}| {bins[-1]['to']}"


def plot_lengths(checked: Checked, target: Path) -> None:
    """Draw the histogram of token lengths as a PNG. Raises DataError when the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bins = checked.lengths["histogram"]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.bar([b["from"] for b in bins], [b["count"] for b in bins], [b["to"] + 1 - b["from"] for b in bins], align="edge",
             edgecolor="white")  # fmt: skip
    for name, style in (("median", "--"), ("p95", ":")):
        axes.axvline(checked.lengths[name], color="black", linestyle=style, label=f"{name} {checked.lengths[name]:g}")
    axes.set_xlabel("tokens of an example")
    axes.set_ylabel("examples")
    axes.set_title("token lengths")
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(target, dpi=120, format="png")
    except OSError as error:
        raise DataError(f"--png {target}: cannot be written: {error.strerror}; choose a file in a folder that exists") from None
    finally:
        plt.close(figure)
