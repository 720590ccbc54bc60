"""Things made ahead by a background thread, handed over in order."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Stopped = Callable[[], bool]
"""Whether the work is no longer wanted."""


class _End(NamedTuple):
    error: BaseException | None


@contextlib.contextmanager
def made_ahead(make: Callable[[Stopped], Iterator[T]], most: int = 1) -> Iterator[Iterator[T]]:
    """What ``make`` yields, in its order, made by a thread of its own while the caller is busy with something else.

    Inside, an error of ``make`` is raised where the thing that it kept from being made is asked for. When the block is
    left, the thread is told to stop and waited for.

    Args:
        make: is called in the thread; should ask now and then whether it is stopped, and return if so.
        most: things that may be ready, or in the making, beside the one in use.
    """
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    room = threading.Semaphore(most)
    stopped = threading.Event()

    def work() -> None:
        try:
            things = make(stopped.is_set)
            while room.acquire() and not stopped.is_set():
                ready.put(next(things))
        except StopIteration:
            ready.put(_End(None))
        except BaseException as error:
            ready.put(_End(error))

    def handed_over() -> Iterator[T]:
        while not isinstance(thing := ready.get(), _End):
            room.release()
            yield thing
        if thing.error is not None:
            raise thing.error

    thread = threading.Thread(target=work, name="tunesmith-ahead", daemon=True)
    thread.start()
    try:
        yield handed_over()
    finally:
        stopped.set()
        room.release()
        thread.join()
