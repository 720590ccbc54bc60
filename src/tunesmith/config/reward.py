"""What ``reward_model`` may say, for each ``reward_model_type``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tunesmith.config.arguments import ModelArguments

REWARD_KEYS = ("reward_model", "reward_model_type", "reward_timeout")
"""Keys that only a stage with a reward model heeds."""


def function_of(text: str) -> tuple[Path, str]:
    """``path/to/file.py:name`` -> (path, name); the name is empty where there is none."""
    path, _, name = text.rpartition(":")
    return (Path(path).expanduser(), name) if path.endswith(".py") else (Path(text).expanduser(), "")


def reward_problems(args: ModelArguments) -> Iterator[tuple[str, str]]:
    """Yield (key, message) for everything that is wrong with how a reward model is named; nothing is read or run."""
    named, kind = args.reward_model, args.reward_model_type
    if args.reward_timeout is not None and kind != "api":
        yield "reward_timeout", f"has no meaning with reward_model_type: {kind}, only with api; remove the key"
    if named is None:
        yield "reward_model", f"is needed with reward_model_type: {kind}; give {_EXPECTED[kind]}"
    elif (other := _looks_like(named)) != kind and not {other, kind} <= {"lora", "full"}:
        yield "reward_model", f"{named!r} looks like reward_model_type: {other}; with {kind}, expected {_EXPECTED[kind]}"
    elif kind == "function":
        yield from (("reward_model", message) for message in function_problems(named))
    elif kind == "api":
        yield from _address_problems(named)


_EXPECTED = {
    "lora": "the folder of an adapter with a value head beside it",
    "full": "the folder or hub id of a whole model with a value head",
    "function": "path/to/file.py:name",
    "api": "an address, http://... or https://...",
}


def _looks_like(named: str) -> str:
    if "://" in named:
        return "api"
    path, name = function_of(named)
    return "function" if name or path.suffix == ".py" else "lora"


def function_problems(named: str) -> Iterator[str]:
    """Yield what is wrong with ``path/to/file.py:name``; the file is not run."""
    path, name = function_of(named)
    if not name.isidentifier():
        yield f"{named!r} does not say which function of the file; expected {path}:name"
    elif not path.is_file():
        yield f"no such file: {path}; expected path/to/file.py:name"


def _address_problems(named: str) -> Iterator[tuple[str, str]]:
    try:
        parts = urlsplit(named)
        blank = any(character.isspace() for character in named)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or blank
    except ValueError:  # a port that is no number, an address of IPv6 that is none
        parts, bad = None, True
    if parts is None or bad:
        yield "reward_model", f"{named!r} is no address; expected {_EXPECTED['api']}"
    elif parts.username is not None or parts.password is not None:
        yield "reward_model", "holds a name or password, which would be saved with the run; set TUNESMITH_REWARD_KEY instead"
