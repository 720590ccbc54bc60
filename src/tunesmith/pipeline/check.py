"""What all stages of a pipeline would meet, looked for before the first one begins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.check.data_check import Checked, check_config
from tunesmith.check.show import sentences
from tunesmith.config.arguments import RunConfig
from tunesmith.pipeline.plan import Task, stages_to_run


def check_stages(tasks: Sequence[Task]) -> Iterator[tuple[str, Checked]]:
    """Check the stages that are to be run, one after the other, as ``tunesmith check`` does.

    Folders that an earlier stage will make count as there: what goes on from one is looked at with the model that this stage
    begins from. Rows that an earlier stage makes are not looked at.

    Yields:
        (stage, what was found).
    """
    to_come = stages_to_run(tasks)
    begins = {task.stage.run: task.stage.config for task in to_come}
    for task in to_come:
        stage = task.stage
        if stage.opaque:
            yield stage.name, Checked(notes=[f"rows depend on {', '.join(stage.uses)}, and are looked at when it is there"])
        else:
            yield stage.name, check_config(_as_it_begins(stage.config, begins))


def _as_it_begins(config: RunConfig, begins: dict[Path, RunConfig]) -> RunConfig:
    """The configuration without what is not there yet: the base of an earlier stage stands for its result."""
    model, finetuning = config.model, config.finetuning
    base = model.model_name_or_path
    while maker := _maker(base, begins):
        base = maker.model.model_name_or_path
    there = tuple(folder for folder in model.checkpoint_dir if not _maker(folder, begins))
    reward = None if model.reward_model and _maker(model.reward_model, begins) else model.reward_model
    reference = None if finetuning.ref_model and _maker(finetuning.ref_model, begins) else finetuning.ref_model
    changes = {"model_name_or_path": base, "checkpoint_dir": there, "reward_model": reward}
    return config.model_copy(
        update={
            "model": model.model_copy(update=changes),
            "finetuning": finetuning.model_copy(update={"ref_model": reference}),
        }
    )


def _maker(name: str, begins: dict[Path, RunConfig]) -> RunConfig | None:
    """The stage that will make this folder, itself or one in its run folder."""
    return next((config for run, config in begins.items() if Path(name).is_relative_to(run)), None)


def lines(name: str, checked: Checked) -> Iterator[str]:
    """What was found of a stage, each line with its name; the lengths are left to ``tunesmith check``."""
    for line in sentences(replace(checked, lengths={})):
        yield f"{name}: {line}"
