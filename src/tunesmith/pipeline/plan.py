"""What a call has to do: which stages are to be run, gone on with, or left as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tunesmith.config.arguments import RunConfig
from tunesmith.config.pipeline import Pipeline, PipelineStage
from tunesmith.config.policy import reward_files
from tunesmith.config.rules import ONE_SHOT
from tunesmith.data.registry import load_attrs
from tunesmith.data.source import data_files, file_sha
from tunesmith.errors import CheckpointError, ConfigError, DataError
from tunesmith.pipeline.state import Record, State, now
from tunesmith.train.runfiles import MANIFEST, is_finished

_FREE = ONE_SHOT | {"plot_loss", "logging_steps", "check_memory", "do_train", "report_to"}
"""Keys that change nothing of the result."""


@dataclass(frozen=True)
class Task:
    """What is to be done about one stage.

    Attributes:
        stage: which.
        action: ``skip`` leaves a finished one as it is; ``pass`` leaves one that was not asked for.
        record: to be kept when it begins; None where it does not.
    """

    stage: PipelineStage
    action: Literal["run", "resume", "skip", "pass"]
    record: Record | None = None


def plan(pipeline: Pipeline, state: State, only: str | None = None, start: str | None = None) -> list[Task]:
    """Decide about every stage.

    A stage is finished if its run is, with these settings, these data, and from the results that the earlier stages have now.
    One that was begun so and did not end is gone on with. A folder that holds anything else is not touched, unless the stage's
    ``overwrite_output_dir`` (or ``resume_from_checkpoint``) says what to do with it.

    Args:
        pipeline: what is asked for.
        state: what was done before.
        only: run this stage alone.
        start: run from this stage on.

    Raises:
        ConfigError: ``only`` or ``start`` name no stage.
        CheckpointError: a folder is in the way, or a stage that is not to be run is needed and has not finished.
    """
    wanted = _wanted(pipeline, only, start)
    tasks: dict[str, Task] = {}
    made: dict[str, str] = {}
    problems: list[str] = []
    for stage in pipeline.stages:
        fresh = Record(str(stage.run), "running", _settings(stage.config), _data(stage), {}, now())
        known = state.records.get(stage.name)
        if stage.name not in wanted:
            tasks[stage.name] = Task(stage, "pass")
            if known is not None and known.status == "finished" and is_finished(stage.run):
                made[stage.name] = known.began
            continue
        absent = [name for name in stage.uses if name not in made]
        problems += [f"{stage.name}: needs {name}, which has not finished and is not to be run now" for name in absent]
        fresh = Record(**{**vars(fresh), "made_from": {name: made[name] for name in stage.uses if name in made}})
        tasks[stage.name] = task = _decide(stage, fresh, known, problems)
        made[stage.name] = (task.record or known or fresh).began
    if problems:
        raise CheckpointError("\n".join([f"{pipeline.path}: nothing was begun:", *(f"  {problem}" for problem in problems)]))
    return list(tasks.values())


def _wanted(pipeline: Pipeline, only: str | None, start: str | None) -> set[str]:
    if only is not None and start is not None:
        raise ConfigError("--only and --from exclude each other; keep one")
    names = [stage.name for stage in pipeline.stages]
    if only is not None:
        return {pipeline.get(only).name}
    return set(names[names.index(pipeline.get(start).name) :]) if start is not None else set(names)


def _decide(stage: PipelineStage, fresh: Record, known: Record | None, problems: list[str]) -> Task:
    training = stage.config.training
    if stage.anew or (training.overwrite_output_dir and not _same(fresh, known)):
        return Task(stage, "run", fresh)
    if known is None or not stage.run.is_dir():
        if (stage.run / MANIFEST).is_file() and not training.resume_from_checkpoint:
            problems.append(f"{stage.name}: {stage.run} holds a run that this pipeline did not make; {_ways(stage)}")
        return Task(stage, "run", fresh)
    if _same(fresh, known):
        if known.status == "finished" and is_finished(stage.run):
            return Task(stage, "skip")
        return Task(stage, "resume", Record(**{**vars(known), "status": "running"}))
    if not training.resume_from_checkpoint:
        problems.append(f"{stage.name}: {stage.run} was made with other {_difference(fresh, known)}; {_ways(stage)}")
    return Task(stage, "resume", fresh)


def _ways(stage: PipelineStage) -> str:
    return f"give {stage.name}.output_dir=..., or {stage.name}.overwrite_output_dir=true to start anew in it"


def _same(fresh: Record, known: Record | None) -> bool:
    return known is not None and not _difference(fresh, known)


def _difference(fresh: Record, known: Record) -> str:
    """What differs between two makings of a stage, in words; empty if nothing does."""
    then, wanted = {**known.settings, "output_dir": known.run}, {**fresh.settings, "output_dir": fresh.run}
    keys = [key for key in {**then, **wanted} if then.get(key) != wanted.get(key)]
    changed = [f"{key}: {_said(then, key)} then, {_said(wanted, key)} now" for key in keys]
    parts = [f"settings ({'; '.join(changed)})"] if changed else []
    parts += ["data"] if fresh.data != known.data else []
    parts += [f"results of {name}" for name, began in fresh.made_from.items() if known.made_from.get(name) != began]
    return " and ".join(parts)


def _said(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "unset"


def _settings(config: RunConfig) -> dict[str, Any]:
    """What differs from the defaults, so that a key of a later version that is not set changes nothing; reward functions."""
    sections = [getattr(config, name).model_dump(mode="json", exclude_defaults=True) for name in type(config).model_fields]
    said = {key: value for section in sections for key, value in section.items() if key not in _FREE}
    return said | {f"SHA-256 of {path}": file_sha(path)[:16] for path in reward_files(config.model, config.policy)}


def _data(stage: PipelineStage) -> list[str]:
    """SHA-256 of the local files of the data sets; what a hub's set holds is said by its name and revision.

    Files that cannot be found are left to the check that follows, which names them; those that an earlier stage makes are told
    by the making of that stage.
    """
    if stage.opaque:
        return []
    data = stage.config.data
    hashes: list[str] = []
    for names in (data.dataset, data.eval_dataset):
        try:
            attrs = load_attrs(data.dataset_dir, names)
            local = [attr for attr in attrs if attr.load_from == "file"]
            hashes += [file_sha(path) for attr in local for path in data_files(attr, data.dataset_dir)]
        except (DataError, OSError):
            hashes.append("")
    return hashes


def stages_to_run(tasks: Sequence[Task]) -> list[Task]:
    """Those that are not left as they are."""
    return [task for task in tasks if task.action in ("run", "resume")]
