"""One data set -> its store of tokenised rows: read, converted, rendered, tokenised, masked, written; or found again.

Rows go through in chunks, so memory does not grow with the set. While one chunk is tokenised (outside Python's lock) the
next is converted and rendered; with workers, whole chunks go to other processes. The order is that of the file.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from tunesmith.config.arguments import DatasetAttr
from tunesmith.data.chat import keys_of, unread_keys
from tunesmith.data.collector import collector_paused
from tunesmith.data.convert import alternates, convert_document, convert_row
from tunesmith.data.documents import DocumentMaker
from tunesmith.data.feedback import FeedbackMaker
from tunesmith.data.learned import Learned
from tunesmith.data.maker import DialogueMaker, Limits, Maker
from tunesmith.data.objective import EVERY_TURN, Objective
from tunesmith.data.pairwise import PairMaker
from tunesmith.data.preference import convert_feedback, convert_pair, convert_prompt
from tunesmith.data.problem import BadRow, RowProblem
from tunesmith.data.prompts import PromptMaker
from tunesmith.data.report import DataReport, Policy
from tunesmith.data.sniff import Target
from tunesmith.data.source import RawRow, data_files, file_sha, read_rows
from tunesmith.data.store import StoreWriter, TokenSet, alone, partial
from tunesmith.data.supervised import ConversationMaker
from tunesmith.data.template import ChatTemplate
from tunesmith.data.tokenize import Encodings, Job, TextEncoder
from tunesmith.data.truncate import Truncation
from tunesmith.data.values import shown
from tunesmith.types import Document, Message, PreferencePair, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")
Batch = list[RawRow | BadRow]
CHUNK = 500
_AHEAD = 2
_PATIENCE = 20_000
"""Rows that are looked at before rows that end the run end it; smaller sets are looked at whole."""
_OUT_OF_TURN = "user and assistant do not speak by turns, the user first; learned as the template shows it"
_EQUAL = "both answers are the same, so there is nothing to prefer"
_DECLARED = ("query_column", "history_column", "system_column", "tools_column")


@dataclass(frozen=True)
class Recipe:
    """All that decides what becomes of a row.

    Attributes:
        target: dialogues or documents.
        cutoff_len, truncation: longest example, and what becomes of longer ones; documents are not cut.
        default_system: system message for rows without one.
        placeholders: name -> text that replaces ``{{name}}``; None: not set, rows that hold it are remarked on.
        date: what the template takes for today.
        options: further variables for the template.
        objective: what is learned of a dialogue (target conversation).
    """

    target: Target
    cutoff_len: int
    truncation: Truncation
    default_system: str | None
    placeholders: Mapping[str, str | None]
    date: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    objective: Objective = EVERY_TURN


@dataclass(frozen=True)
class Place:
    """Where the stores are kept, and how they are made.

    Attributes:
        folder: that holds them.
        workers: processes that convert and tokenise; 0: this one.
        overwrite: make them anew.
        policy: which rows end the work; a large set is given up soon after the first of them.
    """

    folder: Path
    workers: int = 0
    overwrite: bool = False
    policy: Policy = "drop"


@dataclass
class Result:
    """What a chunk of raw rows gives.

    Attributes:
        learned: the tokenised rows, in order.
        rows: raw rows that the chunk held.
        columns: declared columns seen in it.
        report: what became of the rows.
    """

    learned: list[Learned]
    rows: int
    columns: set[str]
    report: DataReport


def tokenised(
    attr: DatasetAttr, dataset_dir: str, limit: int | None, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, place: Place
) -> TokenSet:
    """The store of a data set; made if there is none for exactly these bytes, settings, tokenizer and code.

    Args:
        attr: the set, its layout settled.
        dataset_dir: where its files are.
        limit: read only so many rows.
        recipe: what becomes of a row.
        tokenizer: with a chat template, for dialogues.
        place: where stores are kept.

    Raises:
        DataError, TemplateError: the set or the tokenizer cannot be used.
    """
    chunks = ChunkMaker(attr, recipe, tokenizer)
    key = _key(attr, dataset_dir, limit, chunks)
    target = place.folder / key
    if place.overwrite or not target.is_dir():  # a whole store is read without the lock, so its folder may be read-only
        with alone(target):
            if place.overwrite or not target.is_dir():
                _write(target, chunks, attr, dataset_dir, limit, place)
    return TokenSet(target, attr.dataset_name)


def _write(target: Path, chunks: ChunkMaker, attr: DatasetAttr, dataset_dir: str, limit: int | None, place: Place) -> None:
    if place.overwrite:
        shutil.rmtree(partial(target), ignore_errors=True)
    writer = StoreWriter(target)
    try:
        with collector_paused():
            rows = read_rows(attr, dataset_dir, skip=writer.progress.rows, limit=limit)
            for result in _results(chunks, rows, place.workers):
                writer.append(result.learned, result.rows, result.columns, result.report)
                if writer.progress.rows >= _PATIENCE:
                    writer.progress.report.raise_fatal(place.policy)
    except BaseException:
        writer.close()
        raise
    writer.finish()


def _results(chunks: ChunkMaker, rows: Iterable[RawRow | BadRow], workers: int) -> Iterator[Result]:
    """What each chunk gives, in order."""
    stream = iter(rows)
    batches = iter(lambda: list(islice(stream, CHUNK)), [])
    if workers > 0:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(chunks,)) as pool:
            yield from _in_order((pool.submit(_work, batch) for batch in batches), 2 * workers)
    else:
        with ThreadPoolExecutor(_AHEAD) as pool:  # a thread waits for Python's lock while the other one tokenises
            steps = (chunks.begin(batch) for batch in batches)
            for step in _in_order((pool.submit(chunks.tokenise, step) for step in steps), _AHEAD):
                yield chunks.finish(step)


def _in_order(jobs: Iterable[Future[_T]], ahead: int) -> Iterator[_T]:
    """Results in order; at most ``ahead`` jobs are under way when the oldest result is waited for."""
    waiting: deque[Future[_T]] = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


_worker: ChunkMaker | None = None


def _start_worker(chunks: ChunkMaker) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = chunks


def _work(batch: Batch) -> Result:
    assert _worker is not None
    with collector_paused():
        return _worker.make(batch)


class Step(NamedTuple):
    """A chunk under way: what is known of it, what was rendered, what is to be tokenised, and was."""

    result: Result
    rendered: list[Any]
    job: Job
    encoded: Encodings | None = None


class ChunkMaker:
    """Makes tokenised rows of chunks of raw rows, in three steps; the middle one, the longest, does without Python's lock.

    Args:
        attr: the set.
        recipe: what becomes of a row.
        tokenizer: of the model.
    """

    def __init__(self, attr: DatasetAttr, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
        self.attr = attr
        self.recipe = recipe
        self.tokenizer = tokenizer
        self._declared = {
            name for field in _DECLARED if field in attr.model_fields_set and (name := getattr(attr, field)) is not None
        }
        self._set_up()

    def _set_up(self) -> None:
        self.maker, self.template_source = make_maker(self.recipe, self.tokenizer)

    def __getstate__(self) -> dict[str, Any]:
        return {"attr": self.attr, "recipe": self.recipe, "tokenizer": self.tokenizer, "_declared": self._declared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    @property
    def options_read(self) -> dict[str, Any]:
        """The further variables at which the chat template looks."""
        unread = self.maker.template.unread if isinstance(self.maker, DialogueMaker) else tuple(self.recipe.options)
        return {name: value for name, value in self.recipe.options.items() if name not in unread}

    def facts(self) -> dict[str, Any]:
        """All that decides what is made of a row, as plain values."""
        recipe, dated = self.recipe, "strftime_now" in self.template_source
        return {
            "attr": self.attr.model_dump(mode="json", exclude={"num_samples"}),
            "recipe": {
                **recipe.__dict__,
                "placeholders": dict(recipe.placeholders),
                "date": recipe.date if dated else None,
                "options": self.options_read,
                "objective": asdict(recipe.objective),
            },
            "tokenizer": self.maker.encoder.digest,
            "special": {name: str(token) for name, token in sorted(self.tokenizer.special_tokens_map.items())},
            "template": self.template_source,
        }

    def make(self, batch: Batch) -> Result:
        """All three steps."""
        return self.finish(self.tokenise(self.begin(batch)))

    def begin(self, batch: Batch) -> Step:
        """Convert rows and render them."""
        result = Result([], len(batch), set(), DataReport(read=len(batch)))
        good: list[RawRow] = []
        for row in batch:
            if isinstance(row, BadRow):
                result.report.problem(row.problem, row.source)
            else:
                good.append(row)
        missing = set(self._declared)
        for row in good:
            if missing and not missing.isdisjoint(row.columns):
                missing.difference_update(row.columns)
        result.columns = self._declared - missing
        converted = convert_rows(good, self.attr, self.recipe, result.report)
        rendered = [made for one in converted if (made := self.maker.render(one, result.report)) is not None]
        return Step(result, rendered, self.maker.plan(rendered))

    def tokenise(self, step: Step) -> Step:
        """Tokenise what was rendered."""
        return step._replace(encoded=self.maker.encoder.run(step.job))

    def finish(self, step: Step) -> Result:
        """Make masks."""
        assert step.encoded is not None
        tokens = self.maker.encoder.locate(step.job, step.encoded)
        step.result.learned = self.maker.finish(step.rendered, tokens, step.result.report)
        return step.result


def make_maker(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[Maker[Any, Any], str]:
    """What makes tokenised rows of converted ones, and the source of its chat template (none for documents)."""
    if recipe.target == "document":
        return DocumentMaker(tokenizer, TextEncoder(tokenizer)), ""
    template = ChatTemplate(tokenizer, recipe.date, options=recipe.options)
    limits = Limits(recipe.cutoff_len, recipe.truncation)
    if recipe.target == "conversation":
        return ConversationMaker(template, limits, recipe.objective), template.source
    return _MAKERS[recipe.target](template, limits), template.source


_MAKERS: Mapping[Target, type[DialogueMaker[Any]]] = {
    "pair": PairMaker, "feedback": FeedbackMaker, "prompt": PromptMaker,
}  # fmt: skip
_CONVERTERS: Mapping[Target, Callable[..., Row]] = {
    "conversation": convert_row, "pair": convert_pair, "feedback": convert_feedback, "prompt": convert_prompt,
}  # fmt: skip


def convert_rows(rows: Iterable[RawRow], attr: DatasetAttr, recipe: Recipe, report: DataReport) -> Iterator[Row]:
    """Rows as the recipe wants them; those that cannot be read so, and remarks, go to the report."""
    given = {key: text for key, text in recipe.placeholders.items() if text is not None}
    unset = [key for key, text in recipe.placeholders.items() if text is None]
    keys = None if attr.formatting == "alpaca" or attr.messages_column is None else keys_of(attr)
    for row, source in rows:
        try:
            if recipe.target == "document":
                yield convert_document(row, attr, source)
                continue
            converted = _CONVERTERS[recipe.target](row, attr, source, recipe.default_system, given)
        except RowProblem as problem:
            report.problem(problem, source)
            continue
        messages = messages_of(converted)
        for key in unread_keys(row[attr.messages_column], keys) if keys is not None and attr.messages_column in row else ():
            report.add("note", "unread-key", f"the key {shown(key)} of turns is not read", source)
        if not alternates(messages):
            report.add("note", "out-of-turn", _OUT_OF_TURN, source)
        if isinstance(converted, PreferencePair) and converted.chosen == converted.rejected:
            report.add("note", "equal-answers", _EQUAL, source, "Leave the row out.")
        for key in unset:
            if any(f"{{{{{key}}}}}" in m.content for m in messages):
                message = f"holds {{{{{key}}}}}, but identity_{key} is not set"
                report.add("note", "unfilled", message, source, f"Set identity_{key}.")
        yield converted


def messages_of(row: Row) -> Sequence[Message]:
    """The turns of a row; of a pair, those with the better answer."""
    if isinstance(row, PreferencePair):
        return (*row.prompt, *row.chosen)
    return () if isinstance(row, Document) else row.messages


# ---- what a store is known by


def _key(attr: DatasetAttr, dataset_dir: str, limit: int | None, chunks: ChunkMaker) -> str:
    """A name made of everything that the store depends on."""
    facts = {
        **chunks.facts(),
        "files": [(path.name, file_sha(path)) for path in data_files(attr, dataset_dir)],
        "limit": limit,
        "code": _code(),
        "libraries": [version(name) for name in ("tokenizers", "transformers", "jinja2")],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    stem = "".join(c if c.isalnum() else "-" for c in Path(attr.dataset_name).stem)[:40]
    return f"{stem}-{digest[:32]}"


def _code() -> str:
    """Hash of this package's own files that make examples of rows, so that a change of code is a change of data."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
