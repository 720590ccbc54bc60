"""One file with a list of stages -> the configuration of each, with inherited keys and references to earlier stages.

The file is a mapping: keys that all stages inherit, ``output_dir`` for the folder of the whole, and ``stages``, a list. An
entry is a mapping with ``name``, keys of a run and, if wanted, ``config``, a file of such keys relative to this one; or just
the path of such a file. ``${name}`` in a value is the run folder of an earlier stage.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.config.arguments import RunConfig
from tunesmith.config.load import (
    Problem,
    RawConfig,
    compose,
    construct,
    describe,
    place,
    read_file,
    read_mapping,
    read_overrides,
    read_text,
    settle,
)
from tunesmith.errors import ConfigError

STAGES = "stages"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_DATA = frozenset({"dataset", "eval_dataset", "dataset_dir", "tokenized_path", "template"})
"""Keys that say what is learned; where one refers to an earlier stage, rows cannot be looked at before that stage has run."""


@dataclass(frozen=True)
class PipelineStage:
    """One stage.

    Attributes:
        name: in the pipeline.
        config: its configuration.
        values: the keys given for it, as a file of its own would give them.
        uses: earlier stages that it refers to, directly.
        opaque: whether its rows depend on an earlier stage, so that they cannot be looked at before it has run.
        anew: whether an argument asks to start it anew (``overwrite_output_dir``), though it may have finished.
    """

    name: str
    config: RunConfig
    values: dict[str, Any]
    uses: tuple[str, ...]
    opaque: bool
    anew: bool

    @property
    def run(self) -> Path:
        """The run folder."""
        return Path(self.config.training.output_dir)


@dataclass(frozen=True)
class Pipeline:
    """All of it.

    Attributes:
        path: of the file.
        folder: ``output_dir`` of the whole.
        stages: in order.
        notices: about keys that have no effect.
    """

    path: Path
    folder: Path
    stages: tuple[PipelineStage, ...]
    notices: tuple[str, ...]

    def get(self, name: str) -> PipelineStage:
        """The stage of that name. Raises ConfigError where there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ConfigError(f"{self.path}: {_no_stage(name, [stage.name for stage in self.stages])}")


@dataclass
class _Draft:
    """A stage that is being read: where it stands, its own keys, and after ``_merge`` all of its keys."""

    name: str
    where: str
    raw: RawConfig
    uses: dict[str, None] = field(default_factory=dict)
    opaque: bool = False


def load_pipeline(path: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline.

    Args:
        path: YAML or JSON file.
        overrides: ``key=value`` for all stages, ``stage.key=value`` for one; they win over the files.

    Raises:
        ConfigError: with every problem of every stage.
    """
    path = Path(path)
    common, drafts = _read(path)
    problems = common.problems
    _apply(overrides, common, drafts)
    if not drafts:
        problems.append(Problem(str(path), STAGES, "no stage is given; list at least one"))
    folder = common.values.pop("output_dir", None)
    if not isinstance(folder, str) or not folder:
        message = "required at the top: the folder of the pipeline, in which each stage has one of its own"
        problems.append(Problem(common.places.get("output_dir", str(path)), "output_dir", message))
        folder = "."
    stages = _settle(common, drafts, folder, path, problems)
    if problems:
        raise ConfigError(describe(problems, path), [(p.where, p.key, p.message) for p in problems])
    found, notices = zip(*stages, strict=True)
    return Pipeline(path, Path(folder), found, tuple(dict.fromkeys(line for lines in notices for line in lines)))


# ---- reading


def _read(path: Path) -> tuple[RawConfig, list[_Draft]]:
    """Common keys, and the stages with their own."""
    root = compose(read_text(path), str(path))
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a pipeline is a mapping: common keys, output_dir, and {STAGES}, a list")
    common, entries = RawConfig(), None
    keys = [(str(key.value), value) for key, value in root.value]
    entries = next((value for key, value in keys if key == STAGES), None)
    if not isinstance(entries, yaml.SequenceNode):
        raise ConfigError(f"{path}: no list of stages; give {STAGES}: and below it an entry '- name: ...' for each")
    read_mapping(root, path, common)
    del common.values[STAGES]
    drafts: list[_Draft] = []
    for entry in entries.value:
        where = place(str(path), entry.start_mark)
        draft = _read_entry(entry, path, where)
        common.problems += draft.raw.problems
        if not _NAME.fullmatch(draft.name):
            message = "a stage is named by letters, digits, - and _; give it as name: ..."
            common.problems.append(Problem(where, draft.name, message))
        elif draft.name in {other.name for other in drafts}:
            common.problems.append(Problem(where, draft.name, "two stages of this name; name one of them otherwise"))
        else:
            drafts.append(draft)
    return common, drafts


def _read_entry(entry: yaml.Node, path: Path, where: str) -> _Draft:
    own = RawConfig()
    if isinstance(entry, yaml.MappingNode):
        read_mapping(entry, path, own)
    else:
        own.put("config", construct(entry), where)
    name, file = own.values.pop("name", None), own.values.pop("config", None)
    raw = RawConfig(problems=own.problems)
    if isinstance(file, str) and file:
        try:
            read_file(path.parent / file, raw)
        except ConfigError as error:
            raw.problems.append(Problem(own.places["config"], "config", str(error)))
        name = Path(file).stem if name is None else name
    elif file is not None:
        raw.problems.append(Problem(where, "config", f"the path of a YAML file is expected; found {file!r}"))
    for key, value in own.values.items():
        raw.put(key, value, own.places[key])
    return _Draft("" if name is None else str(name), where, raw)


def _apply(overrides: Sequence[str], common: RawConfig, drafts: list[_Draft]) -> None:
    """Put ``key=value`` into all stages and the top, ``stage.key=value`` into one."""
    given = RawConfig()
    read_overrides(overrides, given)
    common.problems += given.problems
    for key, value in given.values.items():
        stage, dot, own = key.partition(".")
        chosen = [draft for draft in drafts if not dot or draft.name == stage]
        where = given.places[key]
        if dot and not chosen:
            common.problems.append(Problem(where, "", _no_stage(stage, [draft.name for draft in drafts])))
        for draft in chosen if dot or key != "output_dir" else ():
            draft.raw.put(own if dot else key, value, where)
        if not dot and key == "output_dir":
            common.put(key, value, where)


# ---- one configuration for each


def _settle(
    common: RawConfig, drafts: list[_Draft], folder: str, path: Path, problems: list[Problem]
) -> list[tuple[PipelineStage, list[str]]]:
    """Resolve, build and judge every stage; what is wrong is added to ``problems``."""
    folders: dict[str, str] = {}
    owners = {Path(folder).resolve(): "the pipeline itself"}
    kinds: dict[str, str] = {}
    wrong: dict[tuple[bool, Problem], list[str]] = {}
    settled = []
    for draft in drafts:
        raw = _merged(common, draft, folder)
        _resolve(raw, draft, drafts, folders, kinds)
        run = raw.values.get("output_dir")
        folders[draft.name] = run if isinstance(run, str) else f"{folder}/{draft.name}"
        owner = owners.setdefault(Path(folders[draft.name]).resolve(), draft.name)
        if owner != draft.name:
            message = f"{folders[draft.name]} is that of {owner}, too; give each stage a folder of its own"
            raw.problems.append(Problem(raw.places["output_dir"], "output_dir", message))
        values = dict(raw.values)
        config, notices = settle(raw, draft.where)
        if config is not None:
            kinds[draft.name] = config.finetuning.stage
            anew = config.training.overwrite_output_dir and raw.places["overwrite_output_dir"].startswith("argument")
            settled.append((PipelineStage(draft.name, config, values, tuple(draft.uses), draft.opaque, anew), notices))
        for problem in raw.problems:
            inherited = problem.where == common.places.get(problem.key)
            where = draft.where if problem.where in ("missing", "") else problem.where
            wrong.setdefault((inherited, Problem(where, problem.key, problem.message)), []).append(draft.name)
    for (inherited, one), names in wrong.items():
        if not inherited:
            problems.append(Problem(one.where, f"{names[0]}.{one.key}" if one.key else names[0], one.message))
        elif len(names) == len(drafts):
            problems.append(one)
        else:
            heirs = f"inherited by {', '.join(names)}, where null unsets it"
            problems.append(Problem(one.where, one.key, f"{one.message} ({heirs})"))
    return settled


def _merged(common: RawConfig, draft: _Draft, folder: str) -> RawConfig:
    """Inherited keys and the stage's own; ``key: null`` of a stage unsets what it would inherit."""
    merged = RawConfig()
    merged.put("output_dir", f"{folder}/{draft.name}", draft.where)
    for raw in (common, draft.raw):
        for key, value in raw.values.items():
            merged.put(key, value, raw.places[key])
    for key in [key for key, value in draft.raw.values.items() if value is None and key in common.values]:
        del merged.values[key]
    return merged


def _resolve(raw: RawConfig, draft: _Draft, drafts: list[_Draft], folders: dict[str, str], kinds: dict[str, str]) -> None:
    """Put run folders in the place of references; what is wrong with them is added to the problems.

    Args:
        raw: all keys of the stage.
        draft: the stage; told what it uses.
        drafts: all stages.
        folders: run folders of the earlier ones.
        kinds: their ``stage``, as far as their configuration is sound.
    """
    names = [other.name for other in drafts]

    def folder(match: re.Match[str], key: str) -> str:
        name = match[1]
        if name in folders:
            draft.uses[name] = None
            draft.opaque |= key in _DATA
            if key == "reward_model" and kinds.get(name, "rm") != "rm":
                message = f"{name} is of stage {kinds[name]} and scores nothing; name one of stage rm"
                raw.problems.append(Problem(raw.places[key], key, message))
            return folders[name]
        if name not in names:
            message = _no_stage(name, names)
        elif name == draft.name:
            message = f"${{{name}}} is this stage itself; name an earlier one"
        elif draft.name in _needed(name, drafts):
            message = f"${{{name}}} in turn needs {draft.name}: a circle; one of the two has to begin from something else"
        else:
            message = f"${{{name}}} comes later; stages run in the order of the list, so put {name} before {draft.name}"
        raw.problems.append(Problem(raw.places[key], key, message))
        return match[0]

    for key, value in raw.values.items():
        raw.values[key] = _replaced(value, lambda match, key=key: folder(match, key))


def _replaced(value: Any, folder: Any) -> Any:
    """A value with its references replaced, also inside of lists and mappings."""
    if isinstance(value, str):
        return _REFERENCE.sub(folder, value)
    if isinstance(value, list):
        return [_replaced(item, folder) for item in value]
    if isinstance(value, dict):
        return {key: _replaced(item, folder) for key, item in value.items()}
    return value


def _needed(name: str, drafts: list[_Draft]) -> set[str]:
    """Stages that a stage refers to, directly or through others."""
    texts = {draft.name: str(list(draft.raw.values.values())) for draft in drafts}
    found, new = set[str](), {name}
    while new:
        found |= new
        new = {other for known in new for other in _REFERENCE.findall(texts.get(known, ""))} - found
    return found - {name}


def _no_stage(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
    return f"no stage named {name or 'nothing'}; {hint}"
