"""Threads that ask servers, so that whoever waits for an answer can leave at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Event
from typing import TypeVar
from weakref import WeakSet

from pyint8.errors import CancelledError, RemoteError
from pyint8.host import ending

_T = TypeVar("_T")

# How soon one who waits sees that he should not.
_LOOK_SECONDS = 0.02
# That the end of Python gives those who still wait for a server. After it one that got an answer just then would be
# ended within native code.
_AT_THE_END_SECONDS = 0.5


class Askers:
    """As many as ask at once. obstore's calls cannot be interrupted, but those who are not needed any more can be left.

    They are daemons: one that waits for a server that says nothing ends when obstore gives it up.
    """

    def __init__(self) -> None:
        self._tasks: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        _all.add(self)

    def run(self, task: Callable[[], object]) -> None:
        """Has a thread do something that raises nothing.

        Raises:
            RemoteError: There is no thread, nor can one be started.
        """
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._start()
        self._tasks.put(task)

    def _start(self) -> None:
        thread = threading.Thread(target=self._loop, name="pyint8 asks", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise RemoteError("no thread can be started (see `ulimit -u`)") from error
        else:
            self._threads.append(thread)

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
            with self._lock:
                self._idle += 1

    def call(self, ask: Callable[[], _T], stop: Event) -> _T:
        """What `ask` returns or raises.

        Raises:
            CancelledError: `stop` was set before it did.
            RemoteError: See `run`.
        """
        found: list[_T] = []
        errors: list[BaseException] = []
        has_ended = Event()

        def task() -> None:
            try:
                found.append(ask())
            except BaseException as error:
                errors.append(error)
            has_ended.set()

        self.run(task)
        while not has_ended.wait(_LOOK_SECONDS):
            if stop.is_set():
                raise CancelledError("the stream was closed")
        if errors:
            raise errors.pop()  # and no reference cycle
        return found.pop()

    def close(self) -> None:
        """Ends all threads, each after what it does. Idempotent."""
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, seconds: float) -> None:
        """Waits for them, but no longer."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_all: WeakSet[Askers] = WeakSet()


def _end_all() -> None:
    for askers in list(_all):
        askers.close()
        askers.join(_AT_THE_END_SECONDS)


ending.stop_at_end(_end_all)
