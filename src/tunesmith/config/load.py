"""One flat YAML or JSON file plus ``key=value`` arguments -> ``RunConfig``; every problem is reported at once.

The YAML is read as a tree of nodes so that each message has its line. Only plain values are understood: object
tags, anchors and aliases are refused before anything is constructed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tunesmith.config.arguments import SECTIONS, Arguments, DataArguments, GeneratingArguments, ModelArguments, RunConfig
from tunesmith.config.policy import STAGE_DEFAULTS
from tunesmith.config.rules import (
    ALIAS_VALUES,
    ALIASES,
    NICKNAMES,
    NO_EFFECT,
    ONE_SHOT,
    REFUSED_VALUES,
    UNSUPPORTED,
    violations,
    without_reward,
)
from tunesmith.errors import ConfigError

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp")}
_MAX_BYTES = 1 << 20
_MAX_DEPTH = 8


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration: where (``file:line:column`` or the argument), which key, what and why."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}  {self.key + ': ' if self.key else ''}{self.message}"


@dataclass
class RawConfig:
    """Values as written, with the place of each key."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def put(self, key: str, value: Any, where: str) -> None:
        """Set a key; a later one (the command line) wins over the file."""
        self.values[key] = value
        self.places[key] = where


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[RunConfig, list[str]]:
    """Read a configuration.

    Args:
        path: YAML or JSON file; ``None`` if everything is given by ``overrides``.
        overrides: ``key=value`` arguments, values by YAML's rules.

    Returns:
        The frozen configuration, and notices about keys that have no effect.

    Raises:
        ConfigError: with every problem found, each with its line.
    """
    raw = RawConfig()
    if path is not None:
        read_file(Path(path), raw)
    read_overrides(overrides, raw)
    config, notices = settle(raw, str(path or "arguments"))
    if config is None:
        raise ConfigError(describe(raw.problems, path), [(p.where, p.key, p.message) for p in raw.problems])
    return config, notices


def settle(raw: RawConfig, source: str) -> tuple[RunConfig | None, list[str]]:
    """Build the configuration that raw values make, and judge it.

    Args:
        raw: aliases and keys without effect are taken out of it; what is wrong is added to its problems.
        source: place of a problem whose key is not given.

    Returns:
        The configuration, None where there are problems; notices about keys that have no effect.
    """
    take_aliases(raw)
    notices = take_no_effect(raw)
    notices += _prefer_resuming(raw)
    _take_stage_defaults(raw)
    sections = parse_sections(raw, SECTIONS)
    for key, message in violations(sections):
        raw.problems.append(Problem(raw.places.get(key, source), key, message))
    return (None if raw.problems else RunConfig(**sections)), notices


def _prefer_resuming(raw: RawConfig) -> list[str]:
    """``resume_from_checkpoint`` given as an argument wins over ``overwrite_output_dir`` in the file, with a notice."""
    asked, overwrite = "resume_from_checkpoint", "overwrite_output_dir"
    if not (raw.values.get(asked) and raw.values.get(overwrite)):
        return []
    if not raw.places[asked].startswith("argument") or raw.places[overwrite].startswith("argument"):
        return []
    del raw.values[overwrite]
    return [f"{raw.places[overwrite]}  {overwrite} is set aside: the run is to be resumed"]


def _take_stage_defaults(raw: RawConfig) -> None:
    """Put what a stage takes for granted where nothing is said."""
    for key, value in STAGE_DEFAULTS.get(str(raw.values.get("stage")), {}).items():
        if key == "max_new_tokens" and raw.values.get("max_length") is not None:
            continue  # that says how long an answer can be
        if key not in raw.values or (raw.values[key] is None and key not in GeneratingArguments.model_fields):
            raw.put(key, value, f"default of stage {raw.values['stage']}")


def load_model_settings(
    name_or_path: str, overrides: Sequence[str]
) -> tuple[ModelArguments, DataArguments, GeneratingArguments]:
    """Settings for using a model without a run: only those three sections. Raises ConfigError as ``load_config`` does."""
    raw = RawConfig(values={"model_name_or_path": name_or_path})
    read_overrides(overrides, raw)
    take_aliases(raw)
    wanted: dict[str, type[Arguments]] = {"model": ModelArguments, "data": DataArguments, "generating": GeneratingArguments}
    parsed = parse_sections(raw, wanted)
    asked = parsed.get("model")
    for key, message in without_reward(asked, "chat") if isinstance(asked, ModelArguments) else ():
        raw.problems.append(Problem(raw.places[key], key, message))
    if raw.problems:
        raise ConfigError(describe(raw.problems, None))
    model, data, generating = parsed["model"], parsed["data"], parsed["generating"]
    assert isinstance(model, ModelArguments)
    assert isinstance(data, DataArguments)
    assert isinstance(generating, GeneratingArguments)
    return model, data, generating


def read_file(path: Path, raw: RawConfig) -> None:
    """Read a flat YAML or JSON mapping into ``raw``. Raises ConfigError when it is not one."""
    text = read_text(path)
    if path.suffix == ".json":
        _read_json(text, path, raw)
    else:
        _read_yaml(text, path, raw)


def read_text(path: Path) -> str:
    """The text of a configuration file. Raises ConfigError where there is none, or one that is too large or not UTF-8."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file; give the path of a YAML or JSON file")
    if path.stat().st_size > _MAX_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes; a configuration has at most {_MAX_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None


def _read_json(text: str, path: Path, raw: RawConfig) -> None:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        _report_repeats((k for k, _ in items), path, raw)
        return dict(items)

    try:
        mapping = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}  not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; a configuration is one flat mapping") from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: a configuration is one JSON object of key: value pairs")
    for key, value in mapping.items():
        line = text[: max(text.find(json.dumps(key)), 0)].count("\n") + 1
        raw.put(key, value, f"{path}:{line}")


def _report_repeats(keys: Iterable[str], path: Path, raw: RawConfig) -> None:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raw.problems.append(Problem(str(path), key, "given twice; keep one"))
        seen.add(key)


def _read_yaml(text: str, path: Path, raw: RawConfig) -> None:
    root = compose(text, str(path))
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: a configuration is one flat mapping of key: value lines")
    read_mapping(root, path, raw)


def read_mapping(mapping: yaml.MappingNode, path: Path, raw: RawConfig) -> None:
    """Put the keys of a node of ``path`` into ``raw``, each with its line."""
    _report_repeated_nodes(mapping, path, raw)
    for key_node, value_node in mapping.value:
        raw.put(str(key_node.value), construct(value_node), place(str(path), key_node.start_mark))


def _report_repeated_nodes(mapping: yaml.MappingNode, path: Path, raw: RawConfig) -> None:
    seen: set[str] = set()
    for key_node, value_node in mapping.value:
        key = str(key_node.value)
        if key in seen:
            raw.problems.append(Problem(place(str(path), key_node.start_mark), key, "given twice; keep one"))
        seen.add(key)
        if isinstance(value_node, yaml.MappingNode):
            _report_repeated_nodes(value_node, path, raw)


def compose(text: str, name: str) -> yaml.Node | None:
    """Parse YAML to nodes. Raises ConfigError, before anything is built, on aliases, tags, and what is no YAML."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise ConfigError(f"{place(name, event.start_mark)}  nested too deeply; a configuration is one flat mapping")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError(f"{place(name, event.start_mark)}  anchors and aliases (& *) are not used here")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        where = place(name, error.problem_mark or error.context_mark)
        raise ConfigError(f"{where}  not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {error}") from None
    _check_tags(node, name)
    return node


def place(name: str, mark: Any) -> str:
    """``file:line:column``, counted from 1."""
    return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name


def _check_tags(node: yaml.Node | None, name: str) -> None:
    if node is None:
        return
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{place(name, node.start_mark)}  the tag {node.tag} is refused; only plain values are read")
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_tags(item, name)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _check_tags(key, name)
            _check_tags(value, name)


def construct(node: yaml.Node) -> Any:
    """The plain value of a node; a date stays text."""
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":timestamp"):
        return node.value
    return yaml.SafeLoader("").construct_object(node, deep=True)


def read_overrides(overrides: Sequence[str], raw: RawConfig) -> None:
    """Add ``key=value`` arguments to ``raw``."""
    for argument in overrides:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raw.problems.append(Problem(f"argument {argument!r}", "", "expected key=value"))
            continue
        try:
            node = compose(value, f"argument {key}")
            raw.put(key, None if node is None else construct(node), f"argument {key}")
        except ConfigError:
            raw.put(key, value, f"argument {key}")


def take_aliases(raw: RawConfig) -> None:
    """Put values of other toolkits' keys under the names that mean the same here."""
    for alias, key in ALIASES.items():
        if alias not in raw.values:
            continue
        value, where = raw.values.pop(alias), raw.places.get(alias, "")
        if key in raw.values:
            raw.problems.append(Problem(where, alias, f"says the same as {key}, which is given too; keep one"))
        elif isinstance(value, str) and (alias, value) in REFUSED_VALUES:
            raw.problems.append(Problem(where, alias, REFUSED_VALUES[alias, value]))
        else:
            raw.put(key, ALIAS_VALUES.get((alias, value), value) if isinstance(value, str) else value, where)


def take_no_effect(raw: RawConfig) -> list[str]:
    """Remove keys that cannot change a result and return a notice for each."""
    notices = []
    for key in [k for k in raw.values if k in NO_EFFECT]:
        del raw.values[key]
        notices.append(f"{raw.places[key]}  {key} has no effect: {NO_EFFECT[key]}")
    return notices


def parse_sections(raw: RawConfig, sections: dict[str, type[Arguments]]) -> dict[str, Arguments]:
    """Build each section from its keys; problems are added to ``raw.problems``, unparsable sections are left out."""
    known = {key: name for name, cls in sections.items() for key in cls.model_fields}
    by_section: dict[str, dict[str, Any]] = {name: {} for name in sections}
    for key, value in raw.values.items():
        if key in known:
            by_section[known[key]][key] = value
        else:
            raw.problems.append(Problem(raw.places.get(key, ""), key, unknown_key(key, known)))
    parsed: dict[str, Arguments] = {}
    for name, cls in sections.items():
        try:
            parsed[name] = cls.model_validate(by_section[name])
        except ValidationError as error:
            raw.problems.extend(_field_problems(error, raw))
    return parsed


def unknown_key(key: str, known: Iterable[str]) -> str:
    """What to say about a key that does not exist: the reason if it is a known one elsewhere, else the nearest key."""
    names = list(known)
    if key in UNSUPPORTED:
        return f"not supported: {UNSUPPORTED[key]}"
    if key in NICKNAMES and NICKNAMES[key] in names:
        return f"unknown key. Did you mean {NICKNAMES[key]}?"
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    if close:
        return f"unknown key. Did you mean {close[0]}?"
    return "unknown key; `tunesmith config` lists them all"


def _field_problems(error: ValidationError, raw: RawConfig) -> list[Problem]:
    problems = []
    for item in error.errors(include_url=False):
        key = str(item["loc"][0]) if item["loc"] else ""
        if item["type"] == "missing":
            problems.append(Problem("missing", key, "required; give it in the file or as an argument"))
            continue
        found = repr(item["input"])
        found = found if len(found) <= 60 else found[:57] + "..."
        problems.append(Problem(raw.places.get(key, ""), key, f"{item['msg']}; found {found}"))
    return problems


def describe(problems: list[Problem], path: str | Path | None) -> str:
    """All problems as one message, in the order of the file."""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    head = f"{count} in {path}" if path else f"{count} in the arguments"
    return "\n".join([head + ":", *(f"  {problem}" for problem in problems)])


def dump_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration as one flat YAML file that ``load_config`` reads back."""
    values = {key: value for key, value in config.to_flat().items() if key not in ONE_SHOT}
    text = yaml.safe_dump(values, allow_unicode=True, sort_keys=False, width=120)
    path.write_text(text, encoding="utf-8")
