"""Scores that come from elsewhere: a Python function of the user's, or a server."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from tunesmith.config.reward import function_of
from tunesmith.errors import ModelError
from tunesmith.model.endpoint import Endpoint
from tunesmith.types import Conversation, Message

KEY_VARIABLE = "TUNESMITH_REWARD_KEY"
"""Environment variable with the key that a server asks for; sent as a bearer token, written nowhere."""


def parted(conversation: Conversation) -> tuple[tuple[Message, ...], Message]:
    """The prompt and the answer to it. Raises ModelError when there is no answer."""
    messages = conversation.messages
    if not messages or messages[-1].role != "assistant":
        found = f"ends with a turn by the {messages[-1].role}" if messages else "is empty"
        raise ModelError(f"reward_model: {conversation.source}: {found}; expected the assistant's answer, which is scored")
    return messages[:-1], messages[-1]


def prompt_and_answer(conversation: Conversation) -> tuple[str, str]:
    """The texts that a function or a server is given.

    The prompt is the text of its turns, the system message first, with an empty line between two (of one turn: just its text);
    the answer is the content of the last turn, as it is.

    Raises:
        ModelError: there is no answer.
    """
    earlier, answer = parted(conversation)
    return "\n\n".join(message.content for message in earlier), answer.content


def _checked(found: Any, answered: Sequence[Conversation], where: str) -> torch.Tensor:
    """Scores as float32. Raises ModelError unless they are as many finite numbers as there are answers."""
    count = len(answered)
    if not isinstance(found, list | tuple):
        raise ModelError(f"{where}: expected a list of {count} numbers, found a {type(found).__name__}")
    if len(found) != count:
        raise ModelError(f"{where}: expected {count} numbers, one for each answer in order, found {len(found)}")
    for index, (score, conversation) in enumerate(zip(found, answered, strict=True)):
        if not isinstance(score, Real):
            what = f"a {type(score).__name__} ({str(score)[:40]!r})"
            raise ModelError(f"{where}: score {index} (of {conversation.source}): expected a number, found {what}")
        if not _fits(score):
            what = f"expected a finite number (of float32), found {str(score)[:40]}"
            raise ModelError(f"{where}: score {index} (of {conversation.source}): {what}")
    return torch.tensor([float(score) for score in found], dtype=torch.float32)


def _fits(score: Real) -> bool:
    try:
        return abs(float(score)) <= torch.finfo(torch.float32).max
    except OverflowError:
        return False


# ---- a function


class FunctionScorer:
    """Calls ``name(prompts, responses)`` of a Python file, which is run when the first function of it is made.

    A function with a parameter ``references``, with ``**`` parameters, or with a third parameter that has to be given, gets the
    answers that the data give as well, empty texts where they give none.

    Args:
        named: ``path/to/file.py:name``.
        key: setting that names it, for messages.

    Raises:
        ModelError: the file cannot be imported, or has no such function.
    """

    def __init__(self, named: str, key: str = "reward_model") -> None:
        path, name = function_of(named)
        self._where = f"{key}: {path}:{name}"
        self._path = path.resolve()
        self._function = _imported(self._path, name, self._where)
        self._takes = _references_of(self._function)

    def scores(self, answered: Sequence[Conversation], references: Sequence[str] = ()) -> torch.Tensor:
        """As ``Scorer``; the function is called once.

        Args:
            answered: conversations.
            references: the answers that the data give, as many; none: they give none.
        """
        if not answered:
            return torch.empty(0)
        known = references or [""] * len(answered)
        rows = [(*prompt_and_answer(one), reference) for one, reference in zip(answered, known, strict=True)]
        try:
            found = self._call(rows)
        except (Exception, SystemExit) as error:
            row = self._culprit(rows)
            place = f"at {answered[row].source}" if row is not None else f"for {len(answered)} rows, though for none alone"
            raise ModelError(f"{self._where}: raised {place}: {_reason(error, self._path)}") from error
        return _checked(found, answered, self._where)

    def _call(self, rows: Sequence[tuple[str, str, str]]) -> Any:
        prompts, answers, references = ([row[part] for row in rows] for part in range(3))
        if self._takes == "by name":
            return self._function(prompts, answers, references=references)
        return self._function(prompts, answers, references) if self._takes else self._function(prompts, answers)

    def _culprit(self, rows: Sequence[tuple[str, str, str]]) -> int | None:
        """The first row for which the function also raises alone."""
        if len(rows) == 1:
            return 0
        for number, row in enumerate(rows):
            try:
                self._call([row])
            except (Exception, SystemExit):
                return number
        return None


def _references_of(function: Callable[..., Any]) -> Literal["by name", "third", ""]:
    """Whether and how a function takes references."""
    try:
        parameters = inspect.signature(function).parameters
    except (ValueError, TypeError):  # one that is not written in Python
        return ""
    kinds = [parameter.kind for parameter in parameters.values()]
    if "references" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        named = parameters.get("references")
        return "third" if named is not None and named.kind is named.POSITIONAL_ONLY else "by name"
    needed = [p for p in parameters.values() if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return "third" if len(needed) == 3 else ""


_modules: dict[tuple[Path, int, int], ModuleType] = {}
"""Files that were run, by path, time of change and size."""


def _imported(path: Path, name: str, where: str) -> Callable[..., Any]:
    try:
        found = path.stat()
    except OSError as error:
        raise ModelError(f"{where}: the file cannot be read: {error.strerror}") from None
    key = (path, found.st_mtime_ns, found.st_size)
    if key not in _modules:
        _modules[key] = _module(path, where)
    module = _modules[key]
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        has = f"it has {', '.join(names[:5])}" if names else "it has none"
        raise ModelError(f"{where}: the file has no function {name!r}; {has}")
    return function


def _module(path: Path, where: str) -> ModuleType:
    name = f"tunesmith_reward_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{where}: cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does: dataclasses and the like look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"{where}: the file cannot be imported: {_reason(error, path)}") from error
    return module


def _reason(error: BaseException, path: Path) -> str:
    """Kind, message and, if it passed through the file, the line there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


# ---- a server


class EndpointScorer:
    """Sends ``{"prompts": [...], "responses": [...]}`` to an address; expects ``{"scores": [...]}``.

    ``"references": [...]`` is sent as well where the data give any. How often it is asked: see ``Endpoint``.

    Args:
        address: ``http://`` or ``https://``.
        timeout: seconds to wait for an answer.
        pause: seconds before the second attempt; doubled for each further one.
    """

    def __init__(self, address: str, timeout: float, pause: float = 1.0) -> None:
        self._address = address
        self._server = Endpoint(f"reward_model: {address}", KEY_VARIABLE, timeout, "reward_timeout", pause)

    def scores(self, answered: Sequence[Conversation], references: Sequence[str] = ()) -> torch.Tensor:
        """As ``Scorer``; one request.

        Args:
            answered: conversations.
            references: the answers that the data give, as many; none: they give none.
        """
        if not answered:
            return torch.empty(0)
        pairs = [prompt_and_answer(conversation) for conversation in answered]
        question = {"prompts": [prompt for prompt, _ in pairs], "responses": [answer for _, answer in pairs]}
        if any(references):
            question["references"] = list(references)
        found = self._server.ask(self._address, question)
        if not isinstance(found, dict) or "scores" not in found:
            excerpt = self._server.excerpt(json.dumps(found, ensure_ascii=False).encode())
            raise ModelError(f'{self._server.where}: expected {{"scores": [...]}}, found {excerpt}')
        return _checked(found["scores"], answered, self._server.where)
