"""A configuration's data sets -> examples to train and to evaluate on, with an account of every row."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from tunesmith.config.arguments import DataArguments, DatasetAttr, RunConfig
from tunesmith.data.blocks import documents_to_blocks
from tunesmith.data.collector import collector_paused
from tunesmith.data.convert import alternates, check_columns, convert_document, convert_row
from tunesmith.data.problem import BadRow, RowProblem
from tunesmith.data.registry import load_attrs
from tunesmith.data.report import DataReport, reasons
from tunesmith.data.sniff import Target, settle
from tunesmith.data.source import RawRow, read_rows
from tunesmith.data.supervised import preprocess_data
from tunesmith.errors import DataError
from tunesmith.types import Conversation, Document, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row", Example, Document)
_SNIFFED = 200
_OUT_OF_TURN = "user and assistant do not speak by turns, the user first; learned as the template shows it"


def load_examples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport
) -> tuple[list[Example], list[Example]]:
    """(train, eval) rows of a configuration; what became of each row goes to ``report``.

    Raises:
        DataError: a file cannot be used, rows that ``on_bad_row`` does not let pass (all of them at once), or nothing is
            left to learn.
        TemplateError: the tokenizer cannot be trained on dialogues.
    """
    with collector_paused():
        return _load(config, tokenizer, report)


def _load(config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> tuple[list[Example], list[Example]]:
    data = config.data
    seed = data_seed(config)
    share = data.val_size or data.dev_ratio
    if config.finetuning.stage == "pt":
        documents, held_out = prepare_documents(data, data.dataset, report, seed), []
        if data.eval_dataset:
            held_out = prepare_documents(data, data.eval_dataset, report, seed)
        elif share:
            documents, held_out = split_rows(documents, share, seed)
        report.raise_fatal(data.on_bad_row)
        blocks = preprocess_pretrain(documents, tokenizer, data.cutoff_len, report)
        return blocks, preprocess_pretrain(held_out, tokenizer, data.cutoff_len, report) if held_out else []
    dialogues = prepare_data(data, data.dataset, report, seed)
    unseen = prepare_data(data, data.eval_dataset, report, seed) if data.eval_dataset else []
    report.raise_fatal(data.on_bad_row)
    train = preprocess_data(dialogues, tokenizer, data.cutoff_len, report, data.template_date, data.truncation)
    held_out_examples: list[Example] = []
    if unseen:
        held_out_examples = preprocess_data(unseen, tokenizer, data.cutoff_len, report, data.template_date, data.truncation)
    report.raise_fatal(data.on_bad_row)
    return split_rows(train, share, seed) if share else (train, held_out_examples)


def data_seed(config: RunConfig) -> int:
    """Seed of everything that is drawn from the data."""
    return config.training.seed if config.training.data_seed is None else config.training.data_seed


def prepare_data(args: DataArguments, names: tuple[str, ...], report: DataReport, seed: int = 42) -> list[Conversation]:
    """Read and convert data sets of dialogues, one after the other.

    Raises:
        DataError: anything that makes a file or a set as a whole unusable.
    """
    pairs = (("name", args.identity_name), ("author", args.identity_author))
    placeholders = {key: value for key, value in pairs if value is not None}
    missing = {f"{{{{{key}}}}}": f"holds {{{{{key}}}}}, but identity_{key} is not set" for key, value in pairs if value is None}
    conversations = []
    for attr, rows in _sets(args, names, report, seed, "conversation"):
        check_columns(rows, attr)
        for row, source in rows:
            try:
                conversation = convert_row(row, attr, source, args.default_system, placeholders)
            except RowProblem as problem:
                report.problem(problem, source)
                continue
            if not alternates(conversation.messages):
                report.add("note", "out-of-turn", _OUT_OF_TURN, source)
            for mark, message in missing.items():
                if any(mark in m.content for m in conversation.messages):
                    report.add("note", "unfilled", message, source, f"Set identity_{mark.strip('{}')}.")
            conversations.append(conversation)
    return _not_empty(conversations, report)


def prepare_documents(args: DataArguments, names: tuple[str, ...], report: DataReport, seed: int = 42) -> list[Document]:
    """Read data sets of plain text, one after the other; a row is a document.

    Raises:
        DataError: anything that makes a file or a set as a whole unusable.
    """
    documents = []
    for attr, rows in _sets(args, names, report, seed, "document"):
        for row, source in rows:
            try:
                documents.append(convert_document(row, attr, source))
            except RowProblem as problem:
                report.problem(problem, source)
    return _not_empty(documents, report)


_Made = TypeVar("_Made", Conversation, Document)


def _not_empty(rows: list[_Made], report: DataReport) -> list[_Made]:
    if not rows:
        raise DataError("no row can be trained on:\n  " + reasons(report.of("unreadable", "dropped")))
    return rows


def _sets(
    args: DataArguments, names: tuple[str, ...], report: DataReport, seed: int, target: Target
) -> list[tuple[DatasetAttr, list[RawRow]]]:
    """Each set with its layout and its readable rows; the others go to the report."""
    sets = []
    for attr in load_attrs(args.dataset_dir, names, args.source_prefix):
        _refuse_unsupported(attr)
        rows = _read(attr, args, seed, report)
        if rows:
            attr, sentence = settle(attr, [row.columns for row in rows[:_SNIFFED]], target)
            report.found += [sentence] if sentence else []
            sets.append((attr, rows))
    return sets


def _read(attr: DatasetAttr, args: DataArguments, seed: int, report: DataReport) -> list[RawRow]:
    """The readable rows of one set, drawn and limited as asked."""
    limit = args.max_samples if attr.num_samples is None else None
    rows: list[RawRow] = []
    for row in read_rows(attr, args.dataset_dir, limit=limit):
        if isinstance(row, BadRow):
            report.read += 1
            report.problem(row.problem, row.source)
        else:
            rows.append(row)
    if attr.num_samples is not None and rows:
        rows = _draw(rows, attr.num_samples, seed)[: args.max_samples]
    report.read += len(rows)
    return rows


def _refuse_unsupported(attr: DatasetAttr) -> None:
    reasons_why = {
        "ranking: preference pairs; the stages here learn one answer a row": attr.ranking,
        "a kto_tag column: feedback; the stages here learn every answer": attr.kto_tag_column is not None,
        "a chosen or rejected column: preference pairs": bool(attr.chosen_column or attr.rejected_column),
    }
    found = [reason for reason, given in reasons_why.items() if given]
    if found:
        raise DataError(f"data set {attr.dataset_name!r}: {found[0]} - not supported in this version")


def _draw(rows: list[RawRow], count: int, seed: int) -> list[RawRow]:
    """``count`` rows in a seeded order; the set is repeated when it has fewer."""
    generator = random.Random(seed)
    drawn: list[RawRow] = []
    while len(drawn) < count:
        drawn.extend(generator.sample(rows, min(len(rows), count - len(drawn))))
    return drawn


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


def split_rows(examples: list[Row], held_out: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Divide examples or documents into (train, eval), both in file order.

    Args:
        examples: all rows.
        held_out: share of rows (below 1) or number of rows (1 and up) for evaluation.
        seed: the same seed gives the same split.

    Raises:
        DataError: one side would be empty.
    """
    rows = list({row.source: None for row in examples})  # all views of a row stay on one side
    count = round(len(rows) * held_out) if held_out < 1 else int(held_out)
    if not 0 < count < len(rows):
        raise DataError(
            f"holding out {held_out:g} of {len(rows)} rows leaves {len(rows) - count} to train and {count} to evaluate"
        )
    chosen = {rows[index] for index in np.random.default_rng(seed).permutation(len(rows))[:count].tolist()}
    train = [row for row in examples if row.source not in chosen]
    return train, _once([row for row in examples if row.source in chosen])


def _once(rows: list[Row]) -> list[Row]:
    """Rows that were drawn several times, once; a row's several views all stay."""
    return list({(row.source, _identity(row)): row for row in rows}.values())


def _identity(row: Example | Document) -> tuple[bytes, ...] | str:
    return row.text if isinstance(row, Document) else _bytes(row)


def _bytes(example: Example) -> tuple[bytes, ...]:
    weights = () if example.weights is None else (example.weights.tobytes(),)
    return (example.input_ids.tobytes(), example.labels.tobytes(), *weights)


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the token ids, labels and weights of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        for part in _bytes(example):
            digest.update(part)
    return digest.hexdigest()
