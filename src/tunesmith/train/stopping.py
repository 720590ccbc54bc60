"""SIGINT and SIGTERM in a run: the first one stops it with a checkpoint, the second one at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from tunesmith.errors import Interrupted


class GivenUp(BaseException):
    """Raised by the signal in work that can be given up; no ``Exception``, so that a reward function does not catch it."""


class StopSignals:
    """Hears signals while a run goes on.

    Args:
        say: told that the run is about to stop.

    Attributes:
        number: the signal that came, None so far.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.number: int | None = None
        self._say = say
        self._can_give_up = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within, the first signal is noted, or gives up work that can be; a second one raises KeyboardInterrupt."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def giving_up(self) -> Iterator[None]:
        """Within, the first signal raises GivenUp: the work takes long, and is done again when the run goes on.

        Raises:
            GivenUp: also on entering, if a signal came since the last look at ``number``.
        """
        if self.number is not None:
            raise GivenUp
        self._can_give_up = True
        try:
            yield
        finally:
            self._can_give_up = False

    def interrupted(self, where: str) -> Interrupted:
        """What ends the run; ``where`` it stopped."""
        assert self.number is not None
        return Interrupted(
            f"stopped at {where}; go on with the same command and resume_from_checkpoint=auto", 128 + self.number
        )

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        self._say(f"stopping {'now' if self._can_give_up else 'after this step'}, with a checkpoint; once more stops at once")
        if self._can_give_up:
            raise GivenUp
