"""One row, by its number: what becomes of it, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.config.arguments import RunConfig
from tunesmith.data.learned import Learned
from tunesmith.data.pipeline import ChunkMaker
from tunesmith.data.prepare import find_set, make_recipe
from tunesmith.data.report import Finding
from tunesmith.data.sniff import Target
from tunesmith.data.source import read_rows
from tunesmith.data.template import Certificate, Rendered
from tunesmith.errors import DataError
from tunesmith.types import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inspected:
    """A row under the glass.

    Attributes:
        source: which one.
        kind: what it was read as.
        learned: its tokenised renderings; empty if it is left out. Of a pair, the better side first.
        certificates: what was proven of the mask of each rendering, before any cut; empty for plain text.
        findings: why it is left out, how it was cut, what is remarkable.
    """

    source: Source
    kind: Target
    learned: tuple[Learned, ...]
    certificates: tuple[Certificate, ...]
    findings: tuple[Finding, ...]


def inspect_row(config: RunConfig, name: str, number: int, tokenizer: PreTrainedTokenizerBase, target: Target) -> Inspected:
    """Read, convert, render, tokenise and mask one row as a run would, without the others.

    Args:
        config: of the run.
        name: of the data set, one of ``dataset`` or ``eval_dataset``.
        number: of the row in it, from 1, counted through all its files.
        tokenizer: of the model.
        target: what it is read as.

    Raises:
        DataError: no such row.
        TemplateError: the tokenizer cannot be used.
    """
    data = config.data
    place = data.dataset.index(name) if name in data.dataset else 0
    attr, _ = find_set(data, name, place, target)
    raw = next(read_rows(attr, data.dataset_dir, skip=number - 1, limit=number), None)
    if raw is None:
        raise DataError(f"data set {name!r} has no row {number}; it ends before")
    chunks = ChunkMaker(attr, make_recipe(data, target), tokenizer)
    step = chunks.begin([raw])
    views = step.rendered[0][1] if step.rendered and target != "document" else []
    result = chunks.finish(chunks.tokenise(step))
    findings = tuple(result.report.findings.values())
    return Inspected(raw.source, target, tuple(result.learned), tuple(_certificate(view) for view in views), findings)


def _certificate(view: Rendered) -> Certificate:
    return Certificate(view.turns, bool(view.marked), view.notes)
