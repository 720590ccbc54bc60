"""Data sets -> examples, with an account of every row: kept, cut, dropped, and why."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tunesmith.config.arguments import DataArguments, DatasetAttr, RunConfig
from tunesmith.data.blocks import documents_to_blocks
from tunesmith.data.convert import alternates, check_columns, convert_document, convert_row
from tunesmith.data.problem import BadRow, RowProblem
from tunesmith.data.registry import load_attrs
from tunesmith.data.sniff import Target, settle
from tunesmith.data.source import RawRow, read_rows
from tunesmith.data.template import ChatTemplate, Rendered
from tunesmith.data.tokenize import Text, TextEncoder, Tokens
from tunesmith.errors import DataError, TemplateError
from tunesmith.types import IGNORE_INDEX, Conversation, Document, Example, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", Example, Document)
_CHUNK = 1000
_SNIFFED = 200
_OUT_OF_TURN = "user and assistant do not speak by turns, the user first; learned as the template shows it"
_SEVERAL = "the template shows earlier turns otherwise than when they were the last; each is learned in its own rendering"
_SHOWN = 5


@dataclass
class DataReport:
    """What became of the rows.

    Attributes:
        read: rows in the files (after max_samples).
        kept: rows from which examples were made.
        dropped: reason -> rows left out.
        cut: rows that were longer than cutoff_len and lost their end.
        noted: remark of the template -> rows that it concerns.
        unfilled: rows that hold ``{{name}}`` or ``{{author}}`` while no value is configured.
        tokens: tokens of the kept examples.
        supervised: how many of them are learned.
        found: what the rows of sets without a declared layout look like.
        remainder: tokens behind the last full block of each set, left out (stage pt).
    """

    read: int = 0
    kept: int = 0
    dropped: dict[str, list[Source]] = field(default_factory=dict)
    cut: list[Source] = field(default_factory=list)
    noted: dict[str, list[Source]] = field(default_factory=dict)
    unfilled: list[Source] = field(default_factory=list)
    tokens: int = 0
    supervised: int = 0
    remainder: int = 0
    found: list[str] = field(default_factory=list)

    def drop(self, reason: str, source: Source) -> None:
        """Count a row that is left out."""
        self.dropped.setdefault(reason, []).append(source)

    def lines(self) -> Iterator[str]:
        """The account in sentences, every reason with its count and its first rows."""
        yield from self.found
        share = self.supervised / self.tokens if self.tokens else 0.0
        yield f"{self.kept:,} of {self.read:,} rows kept, {self.tokens:,} tokens, {share:.0%} of them learned"
        for reason, sources in sorted(self.dropped.items(), key=lambda item: -len(item[1])):
            yield f"{len(sources):,} dropped: {reason} ({_name_rows(sources)})"
        if self.cut:
            yield f"{len(self.cut):,} longer than cutoff_len, end cut off and not learned ({_name_rows(self.cut)})"
        if self.remainder:
            yield f"{self.remainder:,} tokens behind the last full block left out"
        for remark, sources in self.noted.items():
            yield f"{len(sources):,} rows: {remark} ({_name_rows(sources)})"
        if self.unfilled:
            count, rows = len(self.unfilled), _name_rows(self.unfilled)
            yield f"{count:,} hold {{{{name}}}} or {{{{author}}}}, but identity_name or identity_author is not set ({rows})"

    def to_dict(self) -> dict[str, Any]:
        """The account for machines: rows as ``file:line`` strings."""
        return {
            "read": self.read,
            "kept": self.kept,
            "tokens": self.tokens,
            "supervised": self.supervised,
            "remainder": self.remainder,
            "found": self.found,
            "dropped": {reason: [str(s) for s in sources] for reason, sources in self.dropped.items()},
            "cut": [str(s) for s in self.cut],
            "noted": {remark: [str(s) for s in sources] for remark, sources in self.noted.items()},
            "unfilled": [str(s) for s in self.unfilled],
        }


def _name_rows(sources: Sequence[Source]) -> str:
    first = ", ".join(str(s) for s in sources[:_SHOWN])
    return first + (", ..." if len(sources) > _SHOWN else "")


def prepare_data(args: DataArguments, names: tuple[str, ...], report: DataReport, seed: int = 42) -> list[Conversation]:
    """Read and convert data sets, one after the other.

    Raises:
        DataError: anything that makes a file unusable, naming file and row.
    """
    pairs = (("name", args.identity_name), ("author", args.identity_author))
    placeholders = {key: value for key, value in pairs if value is not None}
    missing = [f"{{{{{key}}}}}" for key, value in pairs if value is None]
    conversations = []
    for attr in load_attrs(args.dataset_dir, names, args.source_prefix):
        rows = _read(attr, args, seed)
        attr = _settle(attr, rows, "conversation", report)
        check_columns(rows, attr)
        for row, source in rows:
            report.read += 1
            try:
                conversation = convert_row(row, attr, source, args.default_system, placeholders)
            except RowProblem as problem:
                report.drop(str(problem), source)
                continue
            if not alternates(conversation.messages):
                report.noted.setdefault(_OUT_OF_TURN, []).append(source)
            if any(mark in m.content for m in conversation.messages for mark in missing):
                report.unfilled.append(source)
            conversations.append(conversation)
    return conversations


def preprocess_data(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    report: DataReport,
    date: str | None = None,
) -> list[Example]:
    """Render, tokenise and mask conversations for supervised fine-tuning; every assistant turn is learned once.

    A row whose template rewrites earlier turns (reasoning that is dropped later) becomes several examples, so that each
    turn is learned as serving will ask for it.

    A row longer than ``cutoff_len`` tokens loses its end; a row in which nothing is left to learn is dropped. Both
    are counted in ``report``.

    Raises:
        DataError: no row is left.
        TemplateError: the tokenizer has no usable chat template.
    """
    template, encoder = ChatTemplate(tokenizer, date), TextEncoder(tokenizer)
    examples: list[Example] = []
    for chunk in _chunks(conversations, _CHUNK):
        rows: list[tuple[Conversation, list[Rendered]]] = []
        for conversation in chunk:
            try:
                views = template.views(conversation.messages, conversation.tools)
            except TemplateError as error:
                report.drop(str(error), conversation.source)
                continue
            rows.append((conversation, views))
            for note in dict.fromkeys(note for view in views for note in view.notes):
                report.noted.setdefault(note, []).append(conversation.source)
            if len(views) > 1:
                report.noted.setdefault(_SEVERAL, []).append(conversation.source)
        texts = [_text(view) for _, views in rows for view in views]
        tokens = iter(encoder.encode(texts))
        for conversation, views in rows:
            examples += _finish(
                conversation, [_example(conversation, view, next(tokens)) for view in views], cutoff_len, report
            )
    if not examples:
        raise DataError("no trainable tokens in any row:\n  " + "\n  ".join(report.lines()))
    return examples


def _read(attr: DatasetAttr, args: DataArguments, seed: int) -> list[RawRow]:
    """The rows of one set, drawn and limited as asked. Raises DataError with every row that cannot be read."""
    _refuse_unsupported(attr)
    limit = args.max_samples if attr.num_samples is None else None
    rows: list[RawRow] = []
    bad: list[BadRow] = []
    for row in read_rows(attr, args.dataset_dir, limit=limit):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            rows.append(row)
    if bad:
        shown = "\n  ".join(_describe(row) for row in bad[:_SHOWN])
        more = f"\n  and {len(bad) - _SHOWN:,} more" if len(bad) > _SHOWN else ""
        raise DataError(
            f"{attr.dataset_name!r}: {len(bad):,} of {len(bad) + len(rows):,} rows cannot be read:\n  {shown}{more}"
        )
    if attr.num_samples is None:
        return rows
    return _draw(rows, attr.num_samples, seed)[: args.max_samples]


def _settle(attr: DatasetAttr, rows: Sequence[RawRow], target: Target, report: DataReport) -> DatasetAttr:
    attr, sentence = settle(attr, [row.columns for row in rows[:_SNIFFED]], target)
    if sentence:
        report.found.append(sentence)
    return attr


def _refuse_unsupported(attr: DatasetAttr) -> None:
    reasons = {
        "ranking: preference pairs; the stages here learn one answer a row": attr.ranking,
        "a kto_tag column: feedback; the stages here learn every answer": attr.kto_tag_column is not None,
        "a chosen or rejected column: preference pairs": bool(attr.chosen_column or attr.rejected_column),
    }
    found = [reason for reason, given in reasons.items() if given]
    if found:
        raise DataError(f"data set {attr.dataset_name!r}: {found[0]} - not supported in this version")


def _describe(row: BadRow) -> str:
    source, problem = row
    column = f":{problem.column}" if problem.column is not None else ""
    place = f"{source.file}:{source.line}{column}" if source.line else f"{source.file} row {source.row}{column}"
    return f"{place}  {problem.message}{'. ' + problem.fix if problem.fix else ''}"


def _draw(rows: list[RawRow], count: int, seed: int) -> list[RawRow]:
    """``count`` rows in a seeded order; the set is repeated when it has fewer."""
    generator = random.Random(seed)
    drawn: list[RawRow] = []
    while len(drawn) < count:
        drawn.extend(generator.sample(rows, min(len(rows), count - len(drawn))))
    return drawn


def prepare_documents(args: DataArguments, names: tuple[str, ...], report: DataReport, seed: int = 42) -> list[Document]:
    """Read data sets of plain text, one after the other; a row is a document.

    Raises:
        DataError: anything that makes a file unusable, naming file and row.
    """
    documents = []
    for attr in load_attrs(args.dataset_dir, names, args.source_prefix):
        rows = _read(attr, args, seed)
        attr = _settle(attr, rows, "document", report)
        for row, source in rows:
            report.read += 1
            try:
                documents.append(convert_document(row, attr, source))
            except RowProblem as problem:
                report.drop(str(problem), source)
    return documents


def preprocess_pretrain(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int, report: DataReport
) -> list[Example]:
    """Lay documents end to end, closed by the end-of-sequence token, and cut them into blocks.

    Raises:
        DataError: there is less than one block.
        TemplateError: the tokenizer has no end-of-sequence token.
    """
    blocks, rest = documents_to_blocks(documents, tokenizer, length)
    report.kept += len(documents)
    report.remainder += rest
    report.tokens += length * len(blocks)
    report.supervised += (length - 1) * len(blocks)
    if not blocks:
        raise DataError(f"{len(documents)} documents with {rest:,} tokens do not fill one block; lower cutoff_len ({length})")
    return blocks


def load_examples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> tuple[list[Example], list[Example]]:
    """(train, eval) rows of a configuration; what became of each row goes to ``report``.

    Raises:
        DataError, TemplateError: naming file and row.
    """
    data, training = config.data, config.training
    seed = training.seed if training.data_seed is None else training.data_seed
    share = data.val_size or data.dev_ratio
    if config.finetuning.stage == "pt":
        documents, held_out = prepare_documents(data, data.dataset, report, seed), []
        if data.eval_dataset:
            held_out = prepare_documents(data, data.eval_dataset, report, seed)
        elif share:
            documents, held_out = split_rows(documents, share, seed)
        blocks = preprocess_pretrain(documents, tokenizer, data.cutoff_len, report)
        return blocks, preprocess_pretrain(held_out, tokenizer, data.cutoff_len, report) if held_out else []
    conversations = prepare_data(data, data.dataset, report, seed)
    train = preprocess_data(conversations, tokenizer, data.cutoff_len, report, data.template_date)
    if data.eval_dataset:
        held_out_turns = prepare_data(data, data.eval_dataset, report, seed)
        return train, preprocess_data(held_out_turns, tokenizer, data.cutoff_len, report, data.template_date)
    return split_rows(train, share, seed) if share else (train, [])


def _text(view: Rendered) -> Text:
    return Text(view.text, tuple((turn.start, turn.end) for turn in view.turns), view.data)


def _example(conversation: Conversation, view: Rendered, tokens: Tokens) -> Example:
    """The tokens of a view with its labels, and the weights of its turns where they are not all 1."""
    labels = np.full(len(tokens.ids), IGNORE_INDEX, dtype=np.int32)
    factors = [conversation.messages[turn.index].weight for turn in view.turns]
    weights = None if all(factor == 1 for factor in factors) else np.ones(len(tokens.ids), dtype=np.float32)
    for (begin, end), factor in zip(tokens.spans, factors, strict=True):
        labels[begin:end] = tokens.ids[begin:end]
        if weights is not None:
            weights[begin:end] = factor
    return Example(tokens.ids, labels, conversation.source, weights)


def _finish(conversation: Conversation, views: Sequence[Example], cutoff_len: int, report: DataReport) -> list[Example]:
    """The views of a row that can be learned, no longer than ``cutoff_len``; the row is counted once."""
    cut = [view if len(view) <= cutoff_len else _head(view, cutoff_len) for view in views]
    kept = [view for view in cut if count_supervised(view.labels)]
    if not kept:
        long = any(count_supervised(view.labels) for view in views)
        report.drop(f"no answer token within cutoff_len {cutoff_len}" if long else "no trainable token", conversation.source)
        return []
    if any(len(view) > cutoff_len for view in views):
        report.cut.append(conversation.source)
    report.kept += 1
    report.tokens += sum(len(view) for view in kept)
    report.supervised += sum(count_supervised(view.labels) for view in kept)
    return kept


def _head(example: Example, length: int) -> Example:
    weights = None if example.weights is None else example.weights[:length]
    return Example(example.input_ids[:length], example.labels[:length], example.source, weights)


def count_supervised(labels: np.ndarray) -> int:
    """Tokens that are learned: supervised ones, the first of the row excepted (nothing predicts it)."""
    return int((labels[1:] != IGNORE_INDEX).sum())


def _chunks(items: Iterable[Conversation], size: int) -> Iterator[list[Conversation]]:
    chunk: list[Conversation] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def split_rows(examples: list[Row], held_out: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide examples or documents into (train, eval), both in file order.

    Args:
        examples: all rows.
        held_out: share of rows (below 1) or number of rows (1 and up) for evaluation.
        seed: the same seed gives the same split.

    Raises:
        DataError: one side would be empty.
    """
    rows = list(dict.fromkeys(example.source for example in examples))  # a row drawn twice stays on one side
    count = round(len(rows) * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < len(rows):
        raise DataError(
            f"holding out {held_out:g} of {len(rows)} rows leaves {len(rows) - count} to train and {count} to evaluate"
        )
    chosen = {rows[index] for index in np.random.default_rng(seed).permutation(len(rows))[:count].tolist()}
    train = [example for example in examples if example.source not in chosen]
    return train, list({example.source: example for example in examples if example.source in chosen}.values())


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids, labels and weights of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.input_ids.tobytes())
        digest.update(example.labels.tobytes())
        if example.weights is not None:
            digest.update(example.weights.tobytes())
    return digest.hexdigest()
