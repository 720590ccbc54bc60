"""Shows rows exactly as the model is trained on them: the first of a run, or any row by its number."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from tunesmith.check.example import describe, print_dataset_example
from tunesmith.config.arguments import RunConfig
from tunesmith.data.inspect import Inspected, inspect_row
from tunesmith.data.kinds import KINDS, Rows
from tunesmith.data.named import use_template
from tunesmith.data.prepare import load_examples, load_rows, target_of
from tunesmith.data.report import DataReport
from tunesmith.data.selection import Examples
from tunesmith.data.sniff import Target
from tunesmith.data.streaming import load_stream
from tunesmith.data.template import Certificate
from tunesmith.data.thinking import no_effect
from tunesmith.errors import ConfigError
from tunesmith.model.library import quiet_library
from tunesmith.model.tokenizer import load_tokenizer


def preview(config: RunConfig, count: int, console: Console, as_json: bool = False, target: Target | None = None) -> None:
    """Print the first ``count`` training rows: text with the learned part marked, ids and labels; no weights are loaded.

    Args:
        config: of the run.
        count: how many.
        console: where to.
        as_json: one JSON object instead, to standard output.
        target: what rows are read as; what the stage needs if None.
    """
    quiet_library()
    tokenizer = load_tokenizer(config.model)
    notes = [*use_template(tokenizer, config.data.template), *no_effect(tokenizer, config.data.template_options)]
    report = DataReport(found=notes)
    target, total = target or target_of(config), None
    examples: Sequence[Any]
    held_out: Sequence[Any] | None
    if config.data.streaming and target == target_of(config):
        stream, held_out = load_stream(config, tokenizer, report)
        learned, read = stream.first(count)
        report.merge(read)
        examples = [row.example() for row in learned]
    else:
        train, held_out = _load(config, tokenizer, report, target)
        examples, total = train[:count], len(train)
    if as_json:
        rows = [describe(example, tokenizer) for example in examples]
        value = {"report": report.to_dict(), "train_rows": total, "eval_rows": len(held_out or ()), "examples": rows}
        print(json.dumps(value, ensure_ascii=False))
        return
    for line in report.lines():
        console.print(Text(line))
    known = f"{total:,} rows to train on" if total is not None else "a stream of rows to train on"
    console.print(Text(f"{known}, {len(held_out or ()):,} to evaluate on"))
    for number, example in enumerate(examples, 1):
        print_dataset_example(example, tokenizer, console, number)


def _load(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport, target: Target
) -> tuple[Examples | Rows[Any], Examples | Rows[Any] | None]:
    if target in KINDS:
        return load_rows(config, tokenizer, report, KINDS[target])
    return load_examples(config, tokenizer, report, target)


def preview_rows(
    config: RunConfig, rows: Sequence[str], console: Console, as_json: bool = False, target: Target | None = None
) -> None:
    """Print chosen rows with what was proven of their masks, or why they are left out; nothing else is read.

    Args:
        config: of the run.
        rows: each ``17``, a row of the first data set, or ``name:17``.
        console: where to.
        as_json: one JSON object instead, to standard output.
        target: what rows are read as; what the stage needs if None.

    Raises:
        ConfigError: not a row number, or of a data set that the run does not use.
        DataError: no such data set or row.
    """
    wanted = [_parse(row, config) for row in rows]
    quiet_library()
    tokenizer = load_tokenizer(config.model)
    use_template(tokenizer, config.data.template)
    kind = target or target_of(config)
    inspected = [(number, inspect_row(config, name, number, tokenizer, kind)) for name, number in wanted]
    if as_json:
        print(json.dumps({"rows": [_described(row, tokenizer) for _, row in inspected]}, ensure_ascii=False))
        return
    for number, row in inspected:
        examples = _examples(row)
        for example in examples:
            print_dataset_example(example, tokenizer, console, number)
        if not examples:
            console.print(Text(f"\nrow {number}: {row.source}: left out", style="bold"))
        for line in _sentences(row):
            console.print(Text(line))


def _parse(row: str, config: RunConfig) -> tuple[str, int]:
    name, _, number = row.rpartition(":")
    if not number.isdecimal() or int(number) == 0:
        raise ConfigError(f"--row {row}: expected the number of a row, counted from 1, or NAME:NUMBER")
    used = (*config.data.dataset, *config.data.eval_dataset)
    if name and name not in used:
        raise ConfigError(f"--row {row}: the run uses no data set {name!r}; it uses {', '.join(used)}")
    return name or used[0], int(number)


def _examples(row: Inspected) -> list[Any]:
    if row.kind in KINDS:
        kind = KINDS[row.kind]
        return [kind.make(*row.learned[i : i + kind.size]) for i in range(0, len(row.learned), kind.size)]
    return [one.example() for one in row.learned]


def _sentences(row: Inspected) -> Iterator[str]:
    for certificate in row.certificates:
        yield f"certificate: {_certificate(certificate)}"
    for finding in row.findings:
        verb = {"cut": "cut", "note": "note"}.get(finding.kind, "left out")
        yield f"{verb}: {finding.message}{'. ' + finding.fix if finding.fix else ''}"


def _certificate(certificate: Certificate) -> str:
    turns = [
        f"message {turn.index + 1} at characters {turn.start}-{turn.end}"
        + ("" if turn.ended else ", without an end")
        + ("" if turn.served else ", otherwise than in chat")
        for turn in certificate.turns
    ]
    marks = " (marked by the template)" if certificate.marked else ""
    rest = "all text outside the assistant's turns but the first token" if certificate.everything else "nothing else"
    what = f"learned{marks}: {'; '.join([*turns, rest])}" if turns or certificate.everything else "nothing is learned"
    return f"the text is what apply_chat_template renders; {what}"


def _described(row: Inspected, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    certificates = [
        {"turns": [{"message": t.index + 1, "start": t.start, "end": t.end, "ended": t.ended, "served": t.served}
                   for t in c.turns], "marked": c.marked, "everything": c.everything, "notes": list(c.notes)}
        for c in row.certificates
    ]  # fmt: skip
    findings = [{"kind": f.kind, "code": f.code, "message": f.message, "fix": f.fix} for f in row.findings]
    examples = [describe(example, tokenizer) for example in _examples(row)]
    return {"source": str(row.source), "kind": row.kind, "examples": examples, "certificates": certificates,
            "findings": findings}  # fmt: skip
