"""What comparisons of trainers share: their options, the rows, the table and the file that keeps it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import ROOT
from benchmarks.machine import facts, gemm_rate, median
from benchmarks.turns import Contender, take_turns
from tunesmith.model.builtin import fetch


def options(name: str, description: str | None, others: Sequence[str]) -> argparse.ArgumentParser:
    """Options that every comparison has."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=description)
    parser.add_argument("--against", default="bare", help=f"of {', '.join(others)}; comma-separated")
    parser.add_argument("--steps", type=int, default=12, help="measured updates of each")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--cutoff", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help="model folder; the built-in model if unset")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/results/")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str], others: Sequence[str]) -> argparse.Namespace:
    """The options, the names after ``--against`` checked; ``model`` is a folder then."""
    args = parser.parse_args(arguments)
    if unknown := set(args.against.split(",")) - set(others):
        parser.error(f"--against: no such contender: {', '.join(unknown)}; there are {', '.join(others)}")
    args.model = args.model or str(fetch("smollm2-135m"))
    return args


def measure(
    args: argparse.Namespace, contenders: Callable[[Path], list[Contender]], count: int, warm_up: int
) -> tuple[list[Contender], dict[str, float]]:
    """Run contenders by turns on ``count`` rows of ``args.data`` (from the start again where there are fewer).

    Args:
        args: from ``parse``.
        contenders: of the file of rows.
        count: rows.
        warm_up: updates that are not measured.

    Returns:
        The contenders, ours first, and the highest memory of each in MiB.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rows.json"
        write_rows(file, read_rows(args.data), count)
        found = contenders(file)
        return found, take_turns(found, warm_up, args.steps, args.threads)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a ``.json`` or ``.jsonl`` file."""
    text = file.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line]
    return list(rows)


def write_rows(file: Path, rows: Sequence[dict[str, Any]], count: int) -> None:
    """So many of the rows in order, again from the start where they end, for contenders to read."""
    file.write_text(json.dumps([rows[i % len(rows)] for i in range(count)]), encoding="utf-8")


def times_faster(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of their seconds by ours."""
    return median([other / mine for mine, other in zip(ours, theirs, strict=True)])


def loss_gap(ours: Contender, other: Contender) -> float:
    """Largest relative difference of an update's loss."""
    return max(abs(a - b) / b for a, b in zip(ours.losses, other.losses, strict=True))


def machine(threads: int) -> dict[str, Any]:
    """What a figure was measured on, and its rate of bf16 products."""
    return {**facts(threads), "bf16_products_per_second": gemm_rate(threads)}


def publish(
    name: str, args: argparse.Namespace, where: Mapping[str, Any], table: list[dict[str, Any]], heads: Mapping[str, str]
) -> None:
    """Print a table, and keep it where that was asked for.

    Args:
        name: of the comparison.
        args: from ``parse``.
        where: from ``machine``.
        table: one row for each trainer, ours first.
        heads: column of the table -> its heading.
    """
    for key, value in where.items():
        print(f"{key}: {value}")
    lines = ["| " + " | ".join(heads.values()) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join("" if row[key] is None else str(row[key]) for key in heads) + " |" for row in table]
    print("\n".join(lines))
    if args.write:
        against = args.against.replace(",", "-")
        unit = {**vars(args), "data": args.data.name, "model": Path(args.model).name}
        target = ROOT / "benchmarks/results" / f"{where['date']}-{name}-{against}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps({"machine": where, "unit": unit, "result": table}, indent=1) + "\n", encoding="utf-8")
        print(f"kept in {target.relative_to(ROOT)}")
