"""Questions to servers, as JSON over HTTP: tried again where that may help, with a key that is shown nowhere."""

from __future__ import annotations

import email.message
import json
import logging
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage
from typing import IO, Any

from tunesmith.errors import ModelError

log = logging.getLogger(__name__)

_ATTEMPTS = 4
_LONGEST_PAUSE = 60.0
_LARGEST_ANSWER = 64 << 20


class RefusedError(ModelError):
    """A server said no, and would again.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """Asks a server.

    What may pass (no connection, a timeout, status 429 or 5xx) is tried four times, 1, 2 and 4 seconds apart or as the server
    asks; anything else ends at once. Redirections are not followed, because the key would go along.

    Args:
        where: what messages begin with: key and address.
        key_variable: environment variable with the key that the server asks for; sent as a bearer token, written nowhere.
        timeout: seconds to wait for an answer.
        timeout_key: setting that says how long, for messages; empty if there is none.
        pause: seconds before the second attempt; doubled for each further one.
    """

    def __init__(self, where: str, key_variable: str, timeout: float, timeout_key: str = "", pause: float = 1.0) -> None:
        self.where = where
        self._key_variable = key_variable
        self._timeout = timeout
        self._timeout_key = timeout_key
        self._pause = pause
        self._open = urllib.request.build_opener(_Straight()).open

    def ask(self, address: str, question: Any, expected: str = "JSON") -> Any:
        """What the server answers to a question, both plain values of JSON.

        Args:
            address: ``http://`` or ``https://``.
            question: sent by POST.
            expected: in words, for messages; text that is no JSON is given back as it is where it is ``text``.

        Raises:
            RefusedError: a status that no further attempt would change.
            ModelError: no answer after all attempts, or no JSON.
        """
        answer = self._ask(address, json.dumps(question, ensure_ascii=False).encode("utf-8", "replace"))
        if expected == "text":
            return answer.decode("utf-8", "replace")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError):
            raise ModelError(f"{self.where}: expected {expected}, found {self.excerpt(answer)}") from None

    def _ask(self, address: str, body: bytes) -> bytes:
        for attempt in range(_ATTEMPTS):
            pause = self._pause * 2**attempt
            try:
                return self._post(address, body)
            except urllib.error.HTTPError as error:
                with error:
                    reason = f"status {error.code} ({error.reason}): {self.excerpt(error.read(1000))}"
                    if error.code != 429 and error.code < 500:
                        raise RefusedError(f"{self.where}: {reason}{self._hint(error.code)}", error.code) from None
                    pause = _asked_pause(error.headers) or pause
            except (OSError, HTTPException) as error:
                cause = getattr(error, "reason", error)
                waited = isinstance(cause, TimeoutError)
                named = f" ({self._timeout_key})" if self._timeout_key else ""
                reason = f"no answer within {self._timeout:g} s{named}" if waited else f"no answer: {cause}"
            if attempt + 1 < _ATTEMPTS:
                log.warning("%s: %s; trying again in %g s", self.where, reason, pause)
                time.sleep(pause)
        raise ModelError(f"{self.where}: {reason}; tried {_ATTEMPTS} times")

    def _post(self, address: str, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(address, body, headers, method="POST")
        with self._open(request, timeout=self._timeout) as response:
            answer: bytes = response.read(_LARGEST_ANSWER + 1)
        if len(answer) > _LARGEST_ANSWER:
            raise ModelError(f"{self.where}: the answer is larger than {_LARGEST_ANSWER >> 20} MiB")
        return answer

    def excerpt(self, answer: bytes) -> str:
        """The beginning of an answer, without the key, which a server may send back."""
        text = answer.decode("utf-8", "replace")
        key = self._key()
        return repr((text.replace(key, "***") if key else text)[:200])

    def _key(self) -> str:
        """The key, or nothing. Raises ModelError, which does not show it, when it cannot be sent."""
        key = os.environ.get(self._key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ModelError(f"{self._key_variable}: holds characters that no key has, such as a line break; set it anew")
        return key

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            return f"; the server wants a key: set the environment variable {self._key_variable}"
        return "; give the address that it redirects to" if 300 <= status < 400 else ""


class _Straight(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """Follow nothing: the library then reports the status."""


def _asked_pause(headers: email.message.Message) -> float | None:
    """Seconds that ``Retry-After`` asks for, if it gives a number."""
    asked = headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else None
