"""Scores that come from elsewhere: a Python function of the user's, or a server."""

from __future__ import annotations

import email.message
import importlib.util
import json
import logging
import os
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException, HTTPMessage
from numbers import Real
from pathlib import Path
from typing import IO, Any

import torch

from tunesmith.config.reward import function_of
from tunesmith.errors import ModelError
from tunesmith.types import Conversation, Message

log = logging.getLogger(__name__)

KEY_VARIABLE = "TUNESMITH_REWARD_KEY"
"""Environment variable with the key that a server asks for; sent as a bearer token, written nowhere."""
_ATTEMPTS = 4
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 64 << 20


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
    """Calls ``name(prompts, responses)`` of a Python file, which is run when this is made.

    Args:
        named: ``path/to/file.py:name``.

    Raises:
        ModelError: the file cannot be imported, or has no such function.
    """

    def __init__(self, named: str) -> None:
        path, name = function_of(named)
        self._where = f"reward_model: {path}:{name}"
        self._path = path.resolve()
        self._function = _imported(self._path, name, self._where)

    def scores(self, answered: Sequence[Conversation]) -> torch.Tensor:
        """As ``Scorer``; the function is called once."""
        if not answered:
            return torch.empty(0)
        pairs = [prompt_and_answer(conversation) for conversation in answered]
        try:
            found = self._call(pairs)
        except (Exception, SystemExit) as error:
            row = self._culprit(pairs)
            place = f"at {answered[row].source}" if row is not None else f"for {len(answered)} rows, though for none alone"
            raise ModelError(f"{self._where}: raised {place}: {_reason(error, self._path)}") from error
        return _checked(found, answered, self._where)

    def _call(self, pairs: Sequence[tuple[str, str]]) -> Any:
        return self._function([prompt for prompt, _ in pairs], [answer for _, answer in pairs])

    def _culprit(self, pairs: Sequence[tuple[str, str]]) -> int | None:
        """The first row for which the function also raises alone."""
        if len(pairs) == 1:
            return 0
        for row, pair in enumerate(pairs):
            try:
                self._call([pair])
            except (Exception, SystemExit):
                return row
        return None


def _imported(path: Path, name: str, where: str) -> Callable[..., Any]:
    module_name = f"tunesmith_reward_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{where}: cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # as an import does: dataclasses and the like look there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ModelError(f"{where}: the file cannot be imported: {_reason(error, path)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        has = f"it has {', '.join(names[:5])}" if names else "it has none"
        raise ModelError(f"{where}: the file has no function {name!r}; {has}")
    return function


def _reason(error: BaseException, path: Path) -> str:
    """Kind, message and, if it passed through the file, the line there."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    place = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {error}{place}"


# ---- a server


class EndpointScorer:
    """Sends ``{"prompts": [...], "responses": [...]}`` to an address; expects ``{"scores": [...]}``.

    What may pass (no connection, a timeout, status 429 or 5xx) is tried four times, 1, 2 and 4 seconds apart or as the server
    asks; anything else ends at once. Redirections are not followed, because the key would go along.

    Args:
        address: ``http://`` or ``https://``.
        timeout: seconds to wait for an answer.
        pause: seconds before the second attempt; doubled for each further one.
    """

    def __init__(self, address: str, timeout: float, pause: float = 1.0) -> None:
        self._where = f"reward_model: {address}"
        self._address = address
        self._timeout = timeout
        self._pause = pause
        self._open = urllib.request.build_opener(_Straight()).open

    def scores(self, answered: Sequence[Conversation]) -> torch.Tensor:
        """As ``Scorer``; one request."""
        if not answered:
            return torch.empty(0)
        pairs = [prompt_and_answer(conversation) for conversation in answered]
        body = {"prompts": [prompt for prompt, _ in pairs], "responses": [answer for _, answer in pairs]}
        answer = self._ask(json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"))
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            raise ModelError(f"{self._where}: expected JSON, found {self._excerpt(answer)}") from None
        if not isinstance(found, dict) or "scores" not in found:
            raise ModelError(f'{self._where}: expected {{"scores": [...]}}, found {self._excerpt(answer)}')
        return _checked(found["scores"], answered, self._where)

    def _ask(self, body: bytes) -> bytes:
        for attempt in range(_ATTEMPTS):
            pause = self._pause * 2**attempt
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"status {error.code} ({error.reason}): {self._excerpt(error.read(1000))}"
                    if error.code != 429 and error.code < 500:
                        raise ModelError(f"{self._where}: {reason}{_hint(error.code)}") from None
                    pause = _asked_pause(error.headers) or pause
            except (OSError, HTTPException) as error:
                cause = getattr(error, "reason", error)
                waited = isinstance(cause, TimeoutError)
                reason = f"no answer within {self._timeout:g} s (reward_timeout)" if waited else f"no answer: {cause}"
            if attempt + 1 < _ATTEMPTS:
                log.warning("%s: %s; trying again in %g s", self._where, reason, pause)
                time.sleep(pause)
        raise ModelError(f"{self._where}: {reason}; tried {_ATTEMPTS} times")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := _key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, body, headers, method="POST")
        with self._open(request, timeout=self._timeout) as response:
            answer: bytes = response.read(_LARGEST_ANSWER + 1)
        if len(answer) > _LARGEST_ANSWER:
            raise ModelError(f"{self._where}: the answer is larger than {_LARGEST_ANSWER >> 20} MiB; it holds numbers only")
        return answer

    @staticmethod
    def _excerpt(answer: bytes) -> str:
        """The beginning of an answer, without the key, which a server may send back."""
        text = answer.decode("utf-8", "replace")
        key = _key()
        return repr((text.replace(key, "***") if key else text)[:200])


def _key() -> str:
    """The key, or nothing. Raises ModelError, which does not show it, when it cannot be sent."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ModelError(f"{KEY_VARIABLE}: holds characters that no key has, such as a line break; set it anew")
    return key


class _Straight(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Follow nothing: the library then reports the status."""


def _hint(status: int) -> str:
    if status in (401, 403):
        return f"; the server wants a key: set the environment variable {KEY_VARIABLE}"
    return "; give the address that it redirects to" if 300 <= status < 400 else ""


def _asked_pause(headers: email.message.Message) -> float | None:
    """Seconds that ``Retry-After`` asks for, if it gives a number."""
    asked = headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else None
