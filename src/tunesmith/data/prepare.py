"""A configuration's data sets -> examples to train and to evaluate on, with an account of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tunesmith.config.arguments import DataArguments, DatasetAttr, RunConfig
from tunesmith.config.paths import data_cache
from tunesmith.data.kinds import Kind, Rows
from tunesmith.data.memory import RowsInMemory
from tunesmith.data.objective import Objective
from tunesmith.data.pipeline import Place, Recipe, convert_rows, tokenised
from tunesmith.data.problem import BadRow
from tunesmith.data.registry import load_attrs
from tunesmith.data.report import DataReport, reasons
from tunesmith.data.selection import Blocks, Examples, Selection, draw, interleave, joined, split
from tunesmith.data.sniff import Target, settle
from tunesmith.data.source import RawRow, read_rows
from tunesmith.data.truncate import Truncation
from tunesmith.errors import DataError
from tunesmith.types import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

K = TypeVar("K")
_SNIFFED = 200
_FIELDS = {"query_column": "query", "history_column": "history", "system_column": "system", "tools_column": "tools"}


TARGETS: Mapping[str, Target] = {
    "pt": "document", "sft": "conversation", "rm": "pair", "dpo": "pair", "kto": "feedback", "ppo": "prompt", "grpo": "prompt",
}  # fmt: skip
"""Stage -> what it needs of a row."""


def load_examples(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport, target: Target | None = None
) -> tuple[Examples, Examples | None]:
    """(train, eval) rows of a configuration; what became of each row goes to ``report``.

    The rows are tokenised once and kept; they are read from disk as they are needed.

    Args:
        config: of the run.
        tokenizer: of the model.
        report: the account.
        target: ``conversation`` or ``document``; what the stage needs if None.

    Raises:
        DataError: a file cannot be used, rows that ``on_bad_row`` does not let pass (all of them at once), or nothing is
            left to learn.
        TemplateError: the tokenizer cannot be used for the stage.
    """
    length, target = config.data.cutoff_len, target or target_of(config)
    train, held_out = _load(config, tokenizer, report, target)
    if target != "document":
        return train, held_out
    return blocks(train, length, report), None if held_out is None else blocks(held_out, length, report)


def load_rows(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport, kind: Kind[K]
) -> tuple[Rows[K], Rows[K] | None]:
    """(train, eval) pairs, feedback or prompts of a configuration. Otherwise as ``load_examples``."""
    train, held_out = _load(config, tokenizer, report, kind.name)
    return Rows(train, kind), None if held_out is None else Rows(held_out, kind)


def target_of(config: RunConfig) -> Target:
    """What the stage needs of a row."""
    return TARGETS[config.finetuning.stage]


def _load(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport, target: Target
) -> tuple[Selection, Selection | None]:
    data, seed = config.data, data_seed(config)
    train = mix(data, [load_set(config, name, i, tokenizer, report, target) for i, name in enumerate(data.dataset)], seed)
    held_out = None
    if data.eval_dataset:
        held_out = joined([load_set(config, name, 0, tokenizer, report, target) for name in data.eval_dataset])
    report.raise_fatal(data.on_bad_row)
    if not len(train):
        raise DataError("no trainable tokens in any row:\n  " + reasons(report.of("unreadable", "uncertified", "dropped")))
    if share := data.val_size or data.dev_ratio:
        train, held_out = hold_out(train, share, seed)
    return train, held_out


def data_seed(config: RunConfig) -> int:
    """Seed of everything that is drawn from the data."""
    return config.training.seed if config.training.data_seed is None else config.training.data_seed


def load_set(
    config: RunConfig,
    name: str,
    number: int,
    tokenizer: PreTrainedTokenizerBase,
    report: DataReport,
    target: Target,
    stop: bool = True,
) -> Selection:
    """The tokenised rows of one data set.

    Args:
        config: of the run.
        name: of the set.
        number: its place in ``dataset``, which chooses its ``source_prefix``.
        tokenizer: of the model.
        report: the account.
        target: what is needed of a row.
        stop: whether rows that end the run may end the work.

    Raises:
        DataError: the set as a whole cannot be used.
        TemplateError: the tokenizer cannot be used for the stage.
    """
    data = config.data
    recipe = make_recipe(data, target)
    attr, sentence = find_set(data, name, number, target)
    limit = data.max_samples if attr.num_samples is None else None
    report.found += [sentence] if sentence else []
    place = Place(
        folder=Path(data.tokenized_path) if data.tokenized_path else data_cache(),
        workers=data.preprocessing_num_workers or 0,
        overwrite=data.overwrite_cache,
        policy=data.on_bad_row if stop else "drop",
    )
    store = tokenised(attr, data.dataset_dir, limit, recipe, tokenizer, place)
    report.merge(store.progress.report)
    check_columns(attr, store.progress.columns, store.progress.files)
    chosen = Selection([store])
    if attr.num_samples is not None:
        chosen = draw(chosen, min(attr.num_samples, data.max_samples or attr.num_samples), data_seed(config))
    return chosen


def make_recipe(data: DataArguments, target: Target) -> Recipe:
    """What becomes of a row, from the settings.

    Raises:
        DataError: the truncation has no meaning for such rows.
    """
    unfit = _UNFIT.get(target, {}).get(data.truncation)
    if unfit:
        raise DataError(f"truncation: {data.truncation} {unfit}; choose keep_end, drop or error")
    return Recipe(
        target=target,
        cutoff_len=data.cutoff_len,
        truncation=data.truncation,
        default_system=data.default_system,
        placeholders={"name": data.identity_name, "author": data.identity_author},
        date=data.template_date,
        options=data.template_options,
        objective=Objective(data.mask_history, data.train_on_prompt),
    )


def find_set(data: DataArguments, name: str, number: int, target: Target) -> tuple[DatasetAttr, str]:
    """A data set by name, its layout settled, and what was found of it.

    Args:
        data: where it is looked up.
        name: of the set.
        number: its place in ``dataset``, which chooses its ``source_prefix``.
        target: what is needed of a row.

    Raises:
        DataError: no such set, or no layout, or not what is needed.
    """
    prefixes = data.source_prefix.split("|")
    prefix = prefixes[0] if len(prefixes) == 1 else prefixes[number]
    (attr,) = load_attrs(data.dataset_dir, (name,), prefix)
    return settled(attr, data.dataset_dir, target)


_UNFIT: Mapping[Target, Mapping[Truncation, str]] = {
    "pair": {"split": "would tear the two answers of a pair apart"},
    "feedback": {"split": "would tear the answer from the verdict on it"},
    "prompt": {"split": "would leave prompts that ask for nothing", "keep_start": "would cut off what asks for the answer"},
}


def settled(attr: DatasetAttr, dataset_dir: str, target: Target) -> tuple[DatasetAttr, str]:
    """The set with the layout of its first readable rows, and what was found; one without any keeps what it declares.

    Raises:
        DataError: the rows have no layout that is known, or another than the declared one, or are not what is needed.
    """
    readable = (row.columns for row in read_rows(attr, dataset_dir) if not isinstance(row, BadRow))
    rows = list(islice(readable, _SNIFFED))
    return settle(attr, rows, target) if rows else (attr, "")


def check_columns(attr: DatasetAttr, seen: set[str], files: list[str]) -> None:
    """Raise DataError when a column that the data set declares is in none of its rows: a misspelt name, most likely."""
    for field, key in _FIELDS.items():
        name = getattr(attr, field)
        natural = field == "tools_column" and attr.formatting == "openai" and name == "tools"
        if name and field in attr.model_fields_set and name not in seen and not natural and files:
            raise DataError(
                f"{files[0]}: no row has the column {name!r}, which dataset_info.json declares as {key} of "
                f"{attr.dataset_name!r}"
            )


def mix(data: DataArguments, sets: list[Selection], seed: int) -> Selection:
    """Several sets as one, by ``mix_strategy``."""
    everything = joined(sets)
    if data.mix_strategy == "concat" or len(sets) == 1:
        return everything
    over = data.mix_strategy == "interleave_over"
    lengths = [len(s.row_starts) - 1 for s in sets]
    return everything.pick_rows(interleave(lengths, data.interleave_probs or None, over, seed))


def hold_out(rows: Selection, share: float, seed: int) -> tuple[Selection, Selection]:
    """Divide into (train, eval), both in order.

    Args:
        rows: all of them.
        share: of rows (below 1) or number of rows (1 and up) to evaluate on.
        seed: the same seed gives the same rows.

    Raises:
        DataError: one side would be empty.
    """
    total = len(set(rows.rows.tolist()))
    count = round(total * share) if share < 1 else int(share)
    if not 0 < count < total:
        raise DataError(f"holding out {share:g} of {total} rows leaves {total - count} to train and {count} to evaluate")
    return split(rows, count, seed)


def blocks(documents: Selection | RowsInMemory, length: int, report: DataReport) -> Blocks:
    """Documents as blocks; what does not fill the last one is counted.

    Raises:
        DataError: there is less than one block.
    """
    count_blocks(len(documents), int(documents.lengths.sum()), length, report)
    return Blocks(documents, length)


def count_blocks(documents: int, tokens: int, length: int, report: DataReport) -> int:
    """How many blocks of ``length`` there are, counted in the report with what does not fill the last one.

    Raises:
        DataError: there is less than one block.
    """
    count, remainder = divmod(tokens, length)
    if not count:
        raise DataError(f"{documents} documents with {tokens:,} tokens do not fill one block; lower cutoff_len ({length})")
    report.remainder += remainder
    report.tokens += length * count
    report.supervised += (length - 1) * count
    return count


def prepare_data(
    args: DataArguments, names: tuple[str, ...], report: DataReport, target: Target = "conversation"
) -> Iterator[Row]:
    """Data sets as rows of the kind asked for, one set after the other, read as they are asked for.

    Raises:
        DataError: a set as a whole cannot be used.
    """
    recipe = make_recipe(args, target)
    for attr in load_attrs(args.dataset_dir, names, args.source_prefix):
        attr, sentence = settled(attr, args.dataset_dir, target)
        report.found += [sentence] if sentence else []
        yield from convert_rows(_good_rows(attr, args, report), attr, recipe, report)


def _good_rows(attr: DatasetAttr, args: DataArguments, report: DataReport) -> Iterator[RawRow]:
    for row in read_rows(attr, args.dataset_dir, limit=args.max_samples):
        report.read += 1
        if isinstance(row, BadRow):
            report.problem(row.problem, row.source)
        else:
            yield row
