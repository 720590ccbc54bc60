"""``tunesmith predict``: what a finished run says of the rows of a file. A reward model scores their answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from tunesmith.config.arguments import DataArguments, ModelArguments, RunConfig
from tunesmith.config.load import load_config
from tunesmith.config.reward import REWARD_KEYS
from tunesmith.data.prepare import prepare_data, settled
from tunesmith.data.registry import load_attrs
from tunesmith.data.report import DataReport, Kind, reasons
from tunesmith.data.sniff import Target
from tunesmith.data.thinking import is_off, without_reasoning
from tunesmith.errors import CheckpointError, ConfigError, DataError, ModelError
from tunesmith.model.files import ADAPTER_CONFIG
from tunesmith.model.heads import has_head
from tunesmith.model.lineage import without_contained
from tunesmith.model.reward import HEEDED_BY_WHOLE, ModelScorer, load_reward_model
from tunesmith.train.runfiles import CONFIG, is_finished
from tunesmith.types import Conversation, Document, Feedback, Message, PreferencePair, Row

_DATA_KEYS = {
    "dataset_dir", "default_system", "enable_thinking", "identity_author", "identity_name", "max_samples", "source_prefix",
    "template_date",
}  # fmt: skip
_HEEDED = _DATA_KEYS | (ModelArguments.model_fields.keys() - {*REWARD_KEYS, "plot_loss", "add_tokens", "add_special_tokens"})
"""Keys that may be given beside a run that trained an adapter."""
_KINDS: tuple[Target, ...] = ("pair", "feedback", "conversation", "document")
"""What a file may hold, the most telling first."""
_LEFT_OUT: tuple[Kind, ...] = ("unreadable", "uncertified", "dropped")
_CHUNK = 256
"""Rows that are sorted by length, scored and written together."""


def predict(
    target: Path, file: str, overrides: Sequence[str], output: Path | None, overwrite: bool, say: Callable[[str], None]
) -> Path:
    """Score a file with a reward model.

    Args:
        target: finished run of stage rm, or the configuration that it was made with.
        file: path, or a name in ``dataset_info.json``.
        overrides: ``key=value`` settings that win over the run's.
        output: JSONL to write; ``scores-NAME.jsonl`` in the run if None.
        overwrite: whether it may be there already.
        say: told what was found.

    Returns:
        The file that was written.

    Raises:
        ConfigError, CheckpointError: not a finished run of a reward model, or a key that is not heeded.
        DataError: the file cannot be used, or nothing in it can be scored.
        ModelError: the model cannot be loaded, or gives scores that are not finite.
    """
    run, config = _finished_run(target, overrides)
    output = output or run / f"scores-{Path(file).name.partition('.')[0]}.jsonl"
    if output.exists() and Path(file).exists() and output.samefile(file):
        raise ConfigError(f"{output}: is the file that is scored; give another --output")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: there already; give another --output, or --overwrite")
    kind = _kind_of(config.data, file)
    scorer = _scorer(run, config)
    report, scored = DataReport(), _Scored()
    rows = prepare_data(config.data, (file,), report, kind)
    scratch = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("w", encoding="utf-8") as sink:
            while chunk := list(islice(rows, _CHUNK)):
                _score(scorer, chunk, config.data.cutoff_len, report, scored, sink)
        if not scored.count:
            raise DataError(f"{file}: nothing that can be scored:\n  {reasons(report.of(*_LEFT_OUT)) or 'it has no rows'}")
        scratch.replace(output)
    except OSError as error:
        raise DataError(f"{output}: cannot be written: {error.strerror}; make room, or give another --output") from None
    finally:
        scratch.unlink(missing_ok=True)
    for line in (*report.found, *scored.lines(report)):
        say(line)
    return output


def _finished_run(target: Path, overrides: Sequence[str]) -> tuple[Path, RunConfig]:
    """The run folder, and its configuration with what was asked for."""
    run = Path(load_config(target)[0].training.output_dir) if target.is_file() else target
    if not (run / CONFIG).is_file():
        raise CheckpointError(f"{run}: no run (it has no {CONFIG}); give the folder of a finished run, or its YAML")
    if not is_finished(run):
        raise CheckpointError(f"{run}: the run has not finished; go on with resume_from_checkpoint=auto")
    heeded = _HEEDED if (run / ADAPTER_CONFIG).is_file() else _DATA_KEYS.union(HEEDED_BY_WHOLE)
    useless = [key for key in (text.partition("=")[0] for text in overrides) if key not in heeded]
    if useless:
        raise ConfigError(f"{', '.join(useless)}: without effect here; predict takes {', '.join(sorted(heeded))}")
    config, _ = load_config(run / CONFIG, overrides)
    if not any(text.startswith("trust_remote_code=") for text in overrides):  # a run's word is not the user's
        config = config.model_copy(update={"model": config.model.model_copy(update={"trust_remote_code": False})})
    if not has_head(run):
        raise ConfigError(
            f"{run}: a run of stage {config.finetuning.stage}, which has no value head and scores nothing. Give a run of stage "
            f"rm (examples/rm_lora.yaml trains one); to talk to this one: tunesmith chat {run}"
        )
    return run, config.model_copy(update={"data": config.data.model_copy(update={"truncation": "keep_end"})})


def _scorer(run: Path, config: RunConfig) -> ModelScorer:
    """The reward model, which renders as it did in training: the run's own template, on its day."""
    named = {
        "reward_model": str(run),
        "reward_model_type": "lora" if (run / ADAPTER_CONFIG).is_file() else "full",
        "compute_dtype": config.compute_dtype,
    }
    args = without_contained(config.model, run).model_copy(update=named)
    scorer = load_reward_model(args, date=config.data.template_date, options=config.data.template_options)
    assert isinstance(scorer, ModelScorer)
    return scorer


# ---- rows


def _kind_of(data: DataArguments, file: str) -> Target:
    """What the rows of a file are read as."""
    (attr,) = load_attrs(data.dataset_dir, (file,), data.source_prefix)
    problems: dict[Target, DataError] = {}
    for kind in _KINDS:
        try:
            settled(attr, data.dataset_dir, kind)
        except DataError as error:
            problems[kind] = error
        else:
            return kind
    raise problems["conversation"]


def _answered(row: Row) -> dict[str, Conversation]:
    """What is scored of a row: name of the score -> conversation that ends with the answer."""
    match row:
        case PreferencePair():
            sides = {"chosen": row.chosen, "rejected": row.rejected}
            return {name: Conversation((*row.prompt, *turns), row.source, row.tools) for name, turns in sides.items()}
        case Document():
            return {"score": Conversation((Message("assistant", row.text),), row.source)}
        case _:
            return {"score": Conversation(row.messages, row.source, row.tools)}


@dataclass
class _Scored:
    """Sums over the rows that were scored."""

    count: int = 0
    right: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)

    def add(self, row: Row, scores: Mapping[str, float]) -> None:
        """Count a row."""
        self.count += 1
        if isinstance(row, PreferencePair):
            self.right += scores["chosen"] > scores["rejected"]
        for name, score in scores.items():
            known = name if not isinstance(row, Feedback) else "good" if row.desirable else "bad"
            self.sums[known] = self.sums.get(known, 0.0) + score
            self.numbers[known] = self.numbers.get(known, 0) + 1

    def lines(self, report: DataReport) -> Iterator[str]:
        """The account in sentences."""
        means = {name: total / self.numbers[name] for name, total in self.sums.items()}
        told = ", ".join(f"{name} {mean:.4f}" for name, mean in means.items())
        yield f"{self.count:,} of {report.read:,} rows scored; mean score: {told}"
        if "chosen" in means:
            margin = means["chosen"] - means["rejected"]
            yield f"accuracy {self.right / self.count:.4f} (the better answer scores higher), mean margin {margin:.4f}"
        for finding in report.of(*_LEFT_OUT):
            yield f"{finding.count:,} left out: {finding.message} ({finding.places()})"
        for finding in report.of("note"):
            yield f"{finding.count:,} rows: {finding.message} ({finding.places()})"


def _score(
    scorer: ModelScorer, rows: Sequence[Row], cutoff_len: int, report: DataReport, scored: _Scored, sink: IO[str]
) -> None:
    """Score rows together, those of like length at once, and write them in their order."""
    encoded = [(row, made) for row in rows if (made := _encoded(scorer, row, cutoff_len, report))]
    scores = iter(scorer.row_scores([ids for _, made in encoded for ids in made.values()]).tolist())
    for row, made in encoded:
        found = {name: next(scores) for name in made}
        if not all(math.isfinite(score) for score in found.values()):
            raise ModelError(f"the score of {row.source} is {found}; the reward model is spoiled")
        entry: dict[str, Any] = {"row": str(row.source), **found}
        if isinstance(row, Feedback):
            entry["desirable"] = row.desirable
        sink.write(json.dumps(entry, ensure_ascii=False) + "\n")
        scored.add(row, found)
    sink.flush()


def _encoded(scorer: ModelScorer, row: Row, cutoff_len: int, report: DataReport) -> dict[str, np.ndarray] | None:
    """Token ids of what is scored of a row; None, and counted, where the model cannot take it."""
    if not isinstance(row, Document) and is_off(scorer.template):
        row = without_reasoning(row)
    try:
        made = {name: scorer.encode(conversation) for name, conversation in _answered(row).items()}
    except ModelError as error:
        message = str(error).removeprefix(f"reward_model: {row.source}: ")
        report.add("dropped", "not-rendered", message, row.source)
        return None
    longest, positions = max(len(ids) for ids in made.values()), scorer.positions
    if positions is not None and longest > positions:
        report.add("dropped", "too-long", f"longer than the {positions:,} tokens that the model was made for", row.source)
        return None
    if longest > cutoff_len:
        report.add("note", "long", f"longer than the run's cutoff_len {cutoff_len:,}; scored whole", row.source)
    return made
