"""A tokenised row for the eye: what is given dim, what is learned marked, of a pair both sides beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tunesmith.types import IGNORE_INDEX, Example, FeedbackExample, PairExample, PromptExample

Shown = Example | PairExample | FeedbackExample | PromptExample
"""What can be shown."""

_LEARNED = "bold green"
_GIVEN = "dim"


def print_dataset_example(example: Shown, tokenizer: PreTrainedTokenizerBase, console: Console, number: int = 1) -> None:
    """Print one row: learned text in green (between ⟦ and ⟧ where there is no colour), the rest dim; ids and labels below.

    Args:
        example: of any stage; of a pair, both sides are shown beside each other.
        tokenizer: of the model.
        console: where to.
        number: of the row, for its heading.
    """
    sides = sides_of(example)
    counts = "; ".join(f"{name + ': ' if name else ''}{count}" for name, count in ((n, _counts(e)) for n, e in sides))
    console.print()
    console.print(Text(f"row {number}: {example.source}: {counts}", style="bold"))
    texts = [_marked(side, tokenizer, bool(console.color_system)) for _, side in sides]
    if len(sides) == 1:
        console.print(texts[0])
    else:
        table = Table(*(name for name, _ in sides), expand=True, show_lines=True)
        table.add_row(*texts)
        console.print(table, soft_wrap=False)
    for name, side in sides:
        head = f"{name} " if name else ""
        console.print(Text(f"{head}input_ids: {side.input_ids.tolist()}", style=_GIVEN))
        console.print(Text(f"{head}labels:    {side.labels.tolist()}", style=_GIVEN))
    if isinstance(example, PromptExample):
        console.print(Text(f"reference: {example.reference}" if example.reference else "no reference"))


def describe(example: Shown, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row for machines: one object, or for a pair one with ``chosen`` and ``rejected``."""
    if isinstance(example, PairExample):
        both = {name: describe(side, tokenizer) for name, side in sides_of(example)}
        return {"source": str(example.source), **({"margin": example.margin} if example.margin else {}), **both}
    ((_, side),) = sides_of(example)
    pieces = list(runs(side, tokenizer))
    value = {
        "source": str(side.source),
        "tokens": len(side),
        "supervised": int((side.labels != IGNORE_INDEX).sum()),
        "text": "".join(piece for _, piece in pieces),
        "learned_text": [piece for learned, piece in pieces if learned],
        "input_ids": side.input_ids.tolist(),
        "labels": side.labels.tolist(),
    }
    if isinstance(example, FeedbackExample):
        value["desirable"] = example.desirable
    if isinstance(example, PromptExample):
        value["reference"] = example.reference
    return value


def sides_of(example: Shown) -> list[tuple[str, Example]]:
    """(name, tokens and labels) of each part of a row; the name is empty where there is but one."""
    if isinstance(example, PairExample):
        return [("chosen", example.chosen), ("rejected", example.rejected)]
    if isinstance(example, FeedbackExample):
        return [("desirable" if example.desirable else "undesirable", example.example)]
    if isinstance(example, PromptExample):
        labels = example.input_ids * 0 + IGNORE_INDEX
        return [("prompt", Example(example.input_ids, labels, example.source))]
    return [("", example)]


def runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """(learned, text) for each stretch of equal mask."""
    mask = (example.labels != IGNORE_INDEX).tolist()
    begin = 0
    for end in range(1, len(mask) + 1):
        if end == len(mask) or mask[end] != mask[begin]:
            yield mask[begin], str(tokenizer.decode(example.input_ids[begin:end].tolist(), skip_special_tokens=False))
            begin = end


def _counts(example: Example) -> str:
    return f"{len(example)} tokens, {int((example.labels != IGNORE_INDEX).sum())} learned"


def _marked(example: Example, tokenizer: PreTrainedTokenizerBase, coloured: bool) -> Text:
    text = Text()
    for learned, piece in runs(example, tokenizer):
        text.append(f"⟦{piece}⟧" if learned and not coloured else piece, style=_LEARNED if learned else _GIVEN)
    return text
