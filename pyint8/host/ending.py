"""The end of the interpreter: it waits for loads of daemon threads, which must not meet it in native code.

A thread that wants the interpreter's lock back then is ended in the middle of a C++ function, and the process aborts.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pyint8.errors import CancelledError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

_PATIENCE_SECONDS = 10.0
_POLL_SECONDS = 0.005
_AFTERMATH_SECONDS = 2.0


class _Ending:
    """What is under way, by thread, and what stops it."""

    def __init__(self) -> None:
        self.has_begun = False
        self.stops: list[Callable[[], None]] = []
        self.under_way: WeakKeyDictionary[object, threading.Thread] = WeakKeyDictionary()

    def __call__(self) -> None:
        self.has_begun = True
        threads = self._others()
        for stop in self.stops:
            stop()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._others() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        for thread in threads:  # most end with the error, and free tensors, which is native code too
            thread.join(_AFTERMATH_SECONDS / len(threads))

    def _others(self) -> set[threading.Thread]:
        """The other threads that something is under way in."""
        threads = set(self.under_way.values()) - {threading.current_thread()}
        return {thread for thread in threads if thread.is_alive()}


_ending = _Ending()
atexit.register(_ending)


def stop_at_end(stop: Callable[[], None]) -> None:
    """Calls `stop` when the interpreter begins to end; it makes what is under way fail soon, in any thread."""
    _ending.stops.append(stop)


def refuse_at_end() -> None:
    """Raise once the interpreter ends.

    Raises:
        CancelledError: It does.
    """
    if _ending.has_begun:
        raise CancelledError("Python ends, and nothing is loaded any more; join the threads that load before")


def submit(pool: Executor, work: Callable[..., None], *arguments: Any) -> Future[None]:
    """As `pool.submit`.

    Raises:
        CancelledError: The interpreter ends, for which executors are shut down first.
    """
    try:
        return pool.submit(work, *arguments)
    except RuntimeError as error:
        raise CancelledError("Python ends, and nothing is written any more") from error


@contextmanager
def awaited(work: object) -> Iterator[None]:
    """The interpreter's end waits for this block, or until `work` is gone."""
    begin(work)
    try:
        yield
    finally:
        end(work)


def begin(work: object) -> None:
    """The interpreter's end waits until `work` has ended, or is gone, or this thread is."""
    refuse_at_end()
    _ending.under_way[work] = threading.current_thread()


def end(work: object) -> None:
    """Idempotent."""
    _ending.under_way.pop(work, None)
