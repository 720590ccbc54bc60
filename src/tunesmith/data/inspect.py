"""One row, by its number: what becomes of it, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tunesmith.config.arguments import RunConfig
from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Maker
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
    certificates = _certificates(chunks.maker, *step.rendered[0]) if step.rendered and target != "document" else []
    result = chunks.finish(chunks.tokenise(step))
    findings = tuple(result.report.findings.values())
    return Inspected(raw.source, target, tuple(result.learned), tuple(certificates), findings)


def _certificates(maker: Maker[Any, Any], row: Any, views: Sequence[Rendered]) -> list[Certificate]:
    """One of each rendering; where all of the last one is learned, not of its turns without weight or learned before."""
    made = [Certificate(view.turns, bool(view.marked), view.notes) for view in views]
    if isinstance(maker, DialogueMaker) and maker.learns_prompt:
        before = {turn.index for view in views[:-1] for turn in view.turns}
        turns = tuple(t for t in views[-1].turns if t.index not in before and row.messages[t.index].weight > 0)
        made[-1] = replace(made[-1], turns=turns, everything=True)
    return made
