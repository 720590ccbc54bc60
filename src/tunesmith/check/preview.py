"""Shows rows exactly as the model is trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import RunConfig
from tunesmith.data.prepare import load_examples
from tunesmith.data.report import DataReport
from tunesmith.model.library import quiet_library
from tunesmith.model.load import load_tokenizer
from tunesmith.types import IGNORE_INDEX, Example

_LEARNED = "bold green"
_GIVEN = "dim"


def preview(config: RunConfig, count: int, console: Console, as_json: bool = False) -> None:
    """Print the first ``count`` training rows: text with the learned part marked, ids and labels; no weights are loaded."""
    quiet_library()
    tokenizer = load_tokenizer(config.model)
    report = DataReport()
    train, held_out = load_examples(config, tokenizer, report)
    if as_json:
        rows = [describe(example, tokenizer) for example in train[:count]]
        value = {"report": report.to_dict(), "train_rows": len(train), "eval_rows": len(held_out or ()), "examples": rows}
        print(json.dumps(value, ensure_ascii=False))
        return
    for line in report.lines():
        console.print(Text(line))
    console.print(Text(f"{len(train):,} rows to train on, {len(held_out or ()):,} to evaluate on"))
    for number, example in enumerate(train[:count], 1):
        print_dataset_example(example, tokenizer, console, number)


def print_dataset_example(example: Example, tokenizer: PreTrainedTokenizerBase, console: Console, number: int = 1) -> None:
    """Print one row: learned text in green (between ⟦ and ⟧ where there is no colour), the rest dim; then ids and labels."""
    facts = describe(example, tokenizer)
    console.print()
    console.print(
        Text(f"row {number}: {facts['source']}: {facts['tokens']} tokens, {facts['supervised']} learned", style="bold")
    )
    text = Text()
    for learned, piece in runs(example, tokenizer):
        marked = f"⟦{piece}⟧" if learned and not console.color_system else piece
        text.append(marked, style=_LEARNED if learned else _GIVEN)
    console.print(text)
    console.print(Text(f"input_ids: {facts['input_ids']}", style=_GIVEN))
    console.print(Text(f"labels:    {facts['labels']}", style=_GIVEN))


def runs(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[bool, str]]:
    """(learned, text) for each stretch of equal mask."""
    mask = (example.labels != IGNORE_INDEX).tolist()
    begin = 0
    for end in range(1, len(mask) + 1):
        if end == len(mask) or mask[end] != mask[begin]:
            yield mask[begin], str(tokenizer.decode(example.input_ids[begin:end].tolist(), skip_special_tokens=False))
            begin = end


def describe(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A row for machines."""
    pieces = list(runs(example, tokenizer))
    return {
        "source": str(example.source),
        "tokens": len(example),
        "supervised": int((example.labels != IGNORE_INDEX).sum()),
        "text": "".join(piece for _, piece in pieces),
        "learned_text": [piece for learned, piece in pieces if learned],
        "input_ids": example.input_ids.tolist(),
        "labels": example.labels.tolist(),
    }
