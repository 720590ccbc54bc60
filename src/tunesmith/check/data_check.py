"""``tunesmith check``: what training would meet, found without loading a weight."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from tunesmith.config.arguments import RunConfig
from tunesmith.config.load import load_config
from tunesmith.config.policy import POLICY_STAGES, RolloutSize, longest_answer
from tunesmith.data.heaviest import blank_batch
from tunesmith.data.kinds import KINDS, Rows
from tunesmith.data.loader import DataLoader
from tunesmith.data.named import use_template
from tunesmith.data.prepare import blocks, check_columns, data_seed, hold_out, load_set, mix, target_of
from tunesmith.data.report import DataReport, Finding, Policy
from tunesmith.data.selection import Blocks, Examples, Selection, joined
from tunesmith.data.sniff import Target
from tunesmith.data.streaming import open_set
from tunesmith.data.thinking import no_effect
from tunesmith.errors import ConfigError, DataError, TunesmithError
from tunesmith.model.library import quiet_library
from tunesmith.model.precision import pick_device
from tunesmith.model.tokenizer import load_tokenizer
from tunesmith.stages.kto import balanced
from tunesmith.stages.plan import heaviest_batch, plan_run, refuse_impossible
from tunesmith.stages.reference import check_reference
from tunesmith.stages.rewards import check_rewards
from tunesmith.stages.run import TRAINERS
from tunesmith.types import Batch, Source

_PLACE = re.compile(r"^(.*?):(\d+)(?::(\d+))?$")
_BINS = 20
_CERTIFIED = {
    "conversation": "are certified: the text is what apply_chat_template renders, learned are the assistant's turns with their "
    "ends and nothing else",
    "pair": "are certified: both texts are what apply_chat_template renders, learned are the two answers and nothing else",
    "feedback": "are certified: the text is what apply_chat_template renders, learned is the judged answer and nothing else",
}
"""What is proven of each row that is kept."""
_WARNED = 100
"""Rows listed for one warning; errors are all listed."""
_Seen = dict[int, tuple[Selection, int, bool]]
"""Hash of a row -> where it was first: the set, its number there, and whether that is held out."""


@dataclass
class Checked:
    """What was found.

    Attributes:
        errors, warnings: each ``{code, file, line, column, message, fix}``; unknown places are None.
        notes: sentences that are no alarm.
        counts: data set -> rows read, kept, dropped, truncated, duplicate (not of a stream).
        lengths: tokens of the examples: min, median, mean, p95, max, histogram; empty where there are none.
        plan: updates, tokens, shares and memory of the run; empty where it cannot be told, in part where rows are streamed.
        memory: the same of memory, as a sentence.
    """

    errors: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    memory: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {"errors": self.errors, "warnings": self.warnings, "notes": self.notes, "counts": self.counts,
                "lengths": self.lengths, "plan": self.plan}  # fmt: skip


def check(path: str | Path, overrides: Sequence[str] = (), target: Target | None = None) -> Checked:
    """Look at configuration, tokenizer, template and every row. Raises nothing that a user can cause.

    Args:
        path: of the configuration.
        overrides: ``key=value``.
        target: what rows are read as; what the stage needs if None.
    """
    checked = Checked()
    try:
        config, notices = load_config(path, overrides)
    except ConfigError as error:
        checked.errors += [_config_entry(*problem) for problem in error.problems or [("", "", str(error))]]
        return checked
    found = check_config(config, target)
    found.notes[:0] = notices
    return found


def check_config(config: RunConfig, target: Target | None = None) -> Checked:
    """Look at tokenizer, template and every row of a configuration that is sound. Raises nothing that a user can cause."""
    checked = Checked()
    quiet_library()
    try:
        tokenizer = load_tokenizer(config.model)
        checked.notes += use_template(tokenizer, config.data.template)
        _look_at_tokenizer(tokenizer, checked)
        for sentence in no_effect(tokenizer, config.data.template_options):
            checked.warnings.append(_entry("no-effect", sentence, fix="Remove the key, or use a template that knows it."))
        _look_at_data(config, target or target_of(config), tokenizer, checked)
        check_reference(config, tokenizer)
    except TunesmithError as error:
        checked.errors.append(_entry(type(error).__name__, str(error)))
    return checked


def _config_entry(where: str, key: str, message: str) -> dict[str, Any]:
    found = _PLACE.match(where)
    file, line, column = found.groups() if found else (where or None, None, None)
    text = f"{key}: {message}" if key else message
    return {"code": "config", "file": file, "line": int(line) if line else None, "column": int(column) if column else None,
            "message": text, "fix": "tunesmith config lists every key"}  # fmt: skip


def _entry(code: str, message: str, source: Source | None = None, column: int | None = None, fix: str = "") -> dict[str, Any]:
    file, line = (source.file, source.line or source.row) if source else (None, None)
    return {"code": code, "file": file, "line": line, "column": column, "message": message, "fix": fix}


def _look_at_tokenizer(tokenizer: PreTrainedTokenizerBase, checked: Checked) -> None:
    if tokenizer.eos_token_id is None:
        message = "the tokenizer has no end-of-sequence token, so the model could not learn to stop"
        checked.errors.append(_entry("no-eos", message, fix="Set eos_token in tokenizer_config.json."))
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        checked.notes.append(
            "the pad token is the end-of-sequence token; pads are told by position, so it is learned all the same"
        )


# ---- data


def _look_at_data(config: RunConfig, target: Target, tokenizer: PreTrainedTokenizerBase, checked: Checked) -> None:
    data = config.data
    if data.streaming and target not in KINDS:
        _look_at_stream(config, target, tokenizer, checked)
        return
    seen: _Seen = {}
    train = [_look_at_set(config, name, i, target, tokenizer, checked, seen) for i, name in enumerate(data.dataset)]
    held_out = [_look_at_set(config, name, 0, target, tokenizer, checked, seen, held_out=True) for name in data.eval_dataset]
    mixed = mix(data, [rows for rows in train if rows is not None], data_seed(config))
    unseen = joined([rows for rows in held_out if rows is not None])
    if not len(mixed):
        return
    try:
        if share := data.val_size or data.dev_ratio:
            mixed, unseen = hold_out(mixed, share, data_seed(config))
        rows: Examples | Rows[Any] = mixed
        evaluated: Examples | Rows[Any] = unseen
        if target in KINDS:
            rows, evaluated = Rows(mixed, KINDS[target]), Rows(unseen, KINDS[target])
        elif target == "document":
            rows = blocks(mixed, data.cutoff_len, DataReport())
            evaluated = Blocks(unseen, data.cutoff_len)
            checked.notes.append(f"{rows.remainder:,} tokens behind the last full block are left out")
    except DataError as error:
        checked.errors.append(_entry("data", str(error), fix="Change val_size or cutoff_len."))
        return
    checked.lengths = _lengths(*np.unique(mixed.lengths, return_counts=True))
    checked.plan = _plan(config, rows, evaluated)
    if config.finetuning.stage == "kto" and isinstance(rows, Rows) and rows.kind.name == "feedback":
        config, sentence = balanced(config, rows)
        checked.notes.append(sentence)
    if isinstance(rows, Rows) and rows.kind.name == target_of(config) == "prompt":
        _look_at_rewards(config, tokenizer, chain(rows, evaluated), checked)
    if not isinstance(rows, Rows) or rows.kind.name == target_of(config):
        _look_at_memory(config, heaviest_batch(config, rows), checked)


def _look_at_rewards(config: RunConfig, tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Any], checked: Checked) -> None:
    """Whether answers to the prompts can be given a reward."""
    try:
        check_rewards(config, tokenizer, prompts)
    except TunesmithError as error:
        checked.errors.append(_entry("reward", str(error)))


def _look_at_memory(config: RunConfig, batch: Batch, checked: Checked) -> None:
    """Whether the run fits, and what to change if not."""
    try:
        plan = plan_run(config, TRAINERS[config.finetuning.stage], batch, pick_device())
    except TunesmithError as error:
        checked.memory = f"memory: {error}"
        return
    checked.plan["memory"], checked.memory = plan.to_dict(), plan.line()
    if not plan.fits:
        found = checked.errors if plan.hopeless and config.training.check_memory else checked.warnings
        found.append(_entry("memory", plan.shortage().removesuffix("."), fix=f"{plan.advice()}."))


def _look_at_set(
    config: RunConfig,
    name: str,
    number: int,
    target: Target,
    tokenizer: PreTrainedTokenizerBase,
    checked: Checked,
    seen: _Seen,
    held_out: bool = False,
) -> Selection | None:
    """Examples of one set; its rows are counted and its problems listed."""
    report = DataReport()
    rows, duplicates = None, 0
    try:
        rows = load_set(config, name, number, tokenizer, report, target, stop=False)
        duplicates = _repeated(rows, checked, seen, held_out)
    except TunesmithError as error:
        checked.errors.append(_entry(type(error).__name__, str(error)))
    label = f"{name} (evaluation)" if held_out and name in config.data.dataset else name
    if report.kept and target in _CERTIFIED and not config.data.train_on_prompt:
        checked.notes.append(f"{label}: {report.kept:,} rows {_CERTIFIED[target]}")
    _count(label, report, checked, config.data.on_bad_row, duplicates)
    return rows


def _count(name: str, report: DataReport, checked: Checked, policy: Policy, duplicates: int | None = None) -> None:
    """List what was found in a set, and count its rows; repeated ones where they were looked for."""
    _list(report, checked, policy)
    cut = sum(finding.count for finding in report.of("cut"))
    counts = {"read": report.read, "kept": report.kept, "dropped": report.left_out(), "truncated": cut}
    checked.counts[name] = counts if duplicates is None else {**counts, "duplicate": duplicates}


def _look_at_stream(config: RunConfig, target: Target, tokenizer: PreTrainedTokenizerBase, checked: Checked) -> None:
    """Read every row once, keeping nothing but the account and the lengths."""
    data = config.data
    lengths: Counter[int] = Counter()
    supervised = 0
    for number, name in enumerate(data.dataset):
        report = DataReport()
        try:
            opened, columns, files = open_set(config, name, number, target, tokenizer, report), set[str](), set[str]()
            for result in opened.results(0):
                report.merge(result.report)
                lengths.update(len(row.ids) for row in result.learned)
                columns |= result.columns
                files |= {row.source.file for row in result.learned[:1]}
            check_columns(opened.attr, columns, sorted(files))
        except TunesmithError as error:
            checked.errors.append(_entry(type(error).__name__, str(error)))
        _count(name, report, checked, data.on_bad_row)
        supervised += report.supervised
    for name in data.eval_dataset:
        _look_at_set(config, name, 0, target, tokenizer, checked, {}, held_out=True)
    checked.notes.append("streaming: every row was read; repeated rows are not looked for, because nothing is kept")
    if not lengths:
        return
    values = np.array(sorted(lengths))
    counts = np.array([lengths[value] for value in values.tolist()])
    tokens = int(values @ counts)
    documents = target == "document"
    checked.lengths = _lengths(values, counts)
    checked.plan = {
        "train_examples": tokens // data.cutoff_len if documents else int(counts.sum()),
        "updates": config.training.max_steps,
        "tokens_per_epoch": tokens,
        "supervised_share": round((data.cutoff_len - 1) / data.cutoff_len if documents else supervised / tokens, 4),
    }
    longest, size = data.cutoff_len if documents else int(values[-1]), config.training.per_device_train_batch_size
    try:
        refuse_impossible(config, longest)
    except TunesmithError as error:
        checked.errors.append(_entry("memory", str(error)))
        return
    _look_at_memory(config, blank_batch((longest,) * size, (longest - 1) * size), checked)


def _fingerprints(rows: Selection) -> Iterator[tuple[int, int]]:
    """(hash of the tokens of all its views, number of the first of them) for each row."""
    numbers = [*rows.rows.tolist(), -1]
    first, total = 0, 0
    for index in range(len(rows)):
        total = hash((total, rows.tokens(index).tobytes()))
        if numbers[index + 1] != numbers[index]:
            yield total, first
            first, total = index + 1, 0


def _repeated(rows: Selection, checked: Checked, seen: _Seen, held_out: bool) -> int:
    """Count rows that hold the same tokens as an earlier one, and name the first of them."""
    count = 0
    for value, index in _fingerprints(rows):
        earlier, first, was_held_out = seen.setdefault(value, (rows, index, held_out))
        leak, same = held_out and not was_held_out, earlier.source(first)
        if (earlier is rows and first == index) or (same == rows.source(index) and not leak):  # a set may be listed twice
            continue
        count += 1
        if count <= _WARNED:
            code, what = ("leak", "also trained on") if leak else ("duplicate", "the same")
            fix = "Leave one of the two out."
            checked.warnings.append(_entry(code, f"{what}: {same}", rows.source(index), fix=fix))
    if count > _WARNED:
        checked.warnings.append(_entry("duplicate", f"and {count - _WARNED:,} more repeated rows"))
    return count


def _list(report: DataReport, checked: Checked, policy: Policy) -> None:
    """List the findings; rows that the settings leave out (``on_bad_row: drop``) are no errors."""
    checked.notes += report.found
    left_out = report.of("unreadable", "uncertified", "dropped")
    for finding in left_out if policy != "drop" else ():
        checked.errors += _rows(finding, len(finding.rows))
    for finding in [*(left_out if policy == "drop" else ()), *report.of("cut", "note")]:
        checked.warnings += _rows(finding, _WARNED)
        if finding.count > _WARNED:
            checked.warnings.append(_entry(finding.code, f"and {finding.count - _WARNED:,} more rows: {finding.message}"))
    place = lambda entry: (entry["file"] or "", entry["line"] or 0)  # noqa: E731
    checked.errors.sort(key=place)


def _rows(finding: Finding, most: int) -> list[dict[str, Any]]:
    return [_entry(finding.code, finding.message, source, column, finding.fix) for source, column in finding.rows[:most]]


# ---- lengths and plan


def _lengths(values: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Summary of lengths, given the different ones in order and how often each occurs."""
    edges = np.unique(np.linspace(values.min(), values.max() + 1, _BINS + 1).astype(int))
    heights, _ = np.histogram(values, bins=edges, weights=counts)
    bins = [{"from": int(a), "to": int(b) - 1, "count": int(n)} for a, b, n in zip(edges[:-1], edges[1:], heights, strict=True)]
    return {
        "min": int(values.min()),
        "median": _percentile(values, counts, 0.5),
        "mean": round(float(values @ counts / counts.sum()), 1),
        "p95": _percentile(values, counts, 0.95),
        "max": int(values.max()),
        "histogram": bins,
    }


def _percentile(values: np.ndarray, counts: np.ndarray, share: float) -> float:
    """The value below which this share of all lies, between two neighbours in proportion (numpy's default)."""
    upto = counts.cumsum()
    place = share * (int(upto[-1]) - 1)
    low, high = (int(values[np.searchsorted(upto, index, side="right")]) for index in (int(place), ceil(place)))
    return low + (high - low) * (place - int(place))


def _plan(config: RunConfig, train: Examples | Rows[Any], held_out: Examples | Rows[Any]) -> dict[str, Any]:
    if config.finetuning.stage in POLICY_STAGES:
        return _rollouts(config, len(train), len(held_out))
    training = config.training
    capacity = config.data.cutoff_len if config.data.packing else None
    loader = DataLoader(train, training.per_device_train_batch_size, training.gradient_accumulation_steps, capacity=capacity)
    total = training.max_steps if training.max_steps > 0 else ceil(training.num_train_epochs * len(loader))
    tokens = int(train.lengths.sum())
    return {
        "train_examples": len(train),
        "eval_examples": len(held_out),
        "updates_per_epoch": len(loader),
        "updates": total,
        "tokens_per_epoch": tokens,
        "tokens": round(tokens * total / len(loader)),
        "supervised_share": round(train.supervised / tokens, 4),
    }


def _rollouts(config: RunConfig, prompts: int, held_out: int) -> dict[str, Any]:
    """Of a policy: how many answers it makes, and how many updates it makes of them."""
    size, training = RolloutSize.of(config.training, config.policy), config.training
    per_epoch = size.updates_per_epoch(prompts)
    return {
        "prompts": prompts,
        "eval_examples": held_out,
        "updates_per_epoch": per_epoch,
        "updates": training.max_steps if training.max_steps > 0 else ceil(training.num_train_epochs * per_epoch),
        "answers_per_rollout": size.prompts * size.samples,
        "updates_per_rollout": size.updates(size.prompts),
        "longest_answer": longest_answer(config.policy, config.generating),
    }
