"""All stages of a pipeline, in order."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from tunesmith.config.pipeline import Pipeline, PipelineStage, load_pipeline
from tunesmith.errors import StageError
from tunesmith.pipeline import process
from tunesmith.pipeline.plan import Task, plan, stages_to_run
from tunesmith.pipeline.state import State
from tunesmith.report.page import PAGE, PICTURE, Chapter, write_page
from tunesmith.train.runfiles import is_finished

_DONE = {"run": "to be run", "resume": "to be gone on with", "skip": "finished with the same settings", "pass": "not asked for"}


@dataclass(frozen=True)
class Call:
    """What was typed.

    Attributes:
        file: of the pipeline.
        overrides: ``key=value`` and ``stage.key=value``.
        only: this stage alone.
        start: from this stage on.
    """

    file: Path
    overrides: tuple[str, ...] = ()
    only: str | None = None
    start: str | None = None

    def arguments(self) -> list[str]:
        """The arguments of the command line that say the same."""
        chosen = [*(["--only", self.only] if self.only else []), *(["--from", self.start] if self.start else [])]
        return ["pipeline", str(self.file), *self.overrides, *chosen]


def look(call: Call, say: Callable[[str], None]) -> int:
    """Check every stage that would be run, without running it; returns the number of errors.

    Raises:
        ConfigError, CheckpointError: as ``run_pipeline``.
    """
    from tunesmith.pipeline.check import check_stages, lines

    pipeline = load_pipeline(call.file, call.overrides)
    tasks = _planned(pipeline, State.read(pipeline.folder, call.file), call, say)
    errors = 0
    for name, checked in check_stages(tasks):
        errors += len(checked.errors)
        for line in lines(name, checked):
            say(line)
    return errors


def run_pipeline(call: Call, say: Callable[[str], None]) -> None:
    """Run the stages that have not finished, and draw the page of curves after each.

    Raises:
        ConfigError: anything is wrong with file, settings, data or template of any stage; nothing was begun.
        CheckpointError: a folder is in the way (see ``plan``), or another pipeline is at work in it; nothing was begun.
        StageError: a stage failed or was stopped; later ones were not begun.
    """
    pipeline = load_pipeline(call.file, call.overrides)
    with process.locked(pipeline.folder) as held:
        state = State.read(pipeline.folder, call.file)
        tasks = plan(pipeline, state, call.only, call.start)
        to_run = stages_to_run(tasks)
        if to_run and (status := process.start([*call.arguments(), "--dry-run"])):
            raise StageError("no stage was begun: the check before ended as is said above", status)
        for task in tasks:
            if task.action == "skip":
                say(f"{task.stage.name}: {_DONE['skip']}, left as it is ({task.stage.run})")
        for task in to_run:
            _run_stage(task, pipeline, state, call, held, say)
        if not (pipeline.folder / PAGE).is_file():
            _draw(pipeline)
    _say_end(pipeline, say)


def _planned(pipeline: Pipeline, state: State, call: Call, say: Callable[[str], None]) -> list[Task]:
    """What is to be done, and said."""
    tasks = plan(pipeline, state, call.only, call.start)
    for notice in pipeline.notices:
        say(f"note: {notice}")
    say(f"{pipeline.path}: {len(tasks)} stages in {pipeline.folder}")
    width = max(len(task.stage.name) for task in tasks)
    for task in tasks:
        stage = task.stage
        say(f"  {stage.name:{width}}  {stage.config.finetuning.stage:4}  {stage.run}  {_DONE[task.action]}")
    return tasks


def _run_stage(
    task: Task, pipeline: Pipeline, state: State, call: Call, held: tuple[int, ...], say: Callable[[str], None]
) -> None:
    stage = task.stage
    number = pipeline.stages.index(stage) + 1
    say(f"\n== {number} of {len(pipeline.stages)}: {stage.name} ({stage.run})")
    settings = _write_settings(stage, pipeline.folder)
    resume = task.action == "resume" and not stage.config.training.resume_from_checkpoint
    assert task.record is not None
    state.put(stage.name, task.record)
    began = time.monotonic()
    status = process.start(["train", str(settings), *(["resume_from_checkpoint=auto"] if resume else [])], held)
    state.close(stage.name, status, time.monotonic() - began)
    _draw(pipeline)
    if status:
        again = shlex.join(["tunesmith", *call.arguments()])
        raise StageError(
            f"stage {stage.name} ended with exit status {status}; finished stages are kept. Go on with:\n  {again}", status
        )


def _write_settings(stage: PipelineStage, folder: Path) -> Path:
    """The stage's own YAML, which ``tunesmith train`` takes, too."""
    path = folder / f"{stage.name}.yaml"
    text = yaml.safe_dump(stage.values, allow_unicode=True, sort_keys=False, width=120)
    path.write_text(text, encoding="utf-8")
    return path


def _draw(pipeline: Pipeline) -> None:
    """The page, as far as the stages have come."""
    title = f"{pipeline.path.parent.name} {pipeline.path.stem}".strip()
    chapters = [Chapter(stage.name, f"stage {_kind(stage)}", stage.run, _use(stage)) for stage in pipeline.stages]
    write_page(title, chapters, pipeline.folder)


def _kind(stage: PipelineStage) -> str:
    return stage.config.finetuning.stage


def _use(stage: PipelineStage) -> str:
    """What to type to use the result."""
    return f"tunesmith predict {stage.run} FILE" if _kind(stage) == "rm" else f"tunesmith chat {stage.run}"


def _say_end(pipeline: Pipeline, say: Callable[[str], None]) -> None:
    """Where the page lies, and what to type next."""
    say(f"\npage:        {pipeline.folder / PAGE} (the curves alone: {pipeline.folder / PICTURE})")
    talking = [stage for stage in pipeline.stages if _kind(stage) != "rm" and is_finished(stage.run)]
    for stage in talking[-1:]:
        say(f"talk to it:  {_use(stage)}")
