"""A thread that does the same again and again, for as long as there is something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from pyint8.streaming.caller import as_caller


class Pump:
    """Does something in a thread as its caller would, until that returns False or fails.

    Args:
        device: The thread has the caller's current stream of it.

    Attributes:
        runs: Whether the thread does it; where none can be had, the caller has to.
        error: What stopped it; None so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.runs = False
        self.error: BaseException | None = None
        self._name, self._as_caller = f"pyint8 pump {device}", as_caller([device])
        self._thread: threading.Thread | None = None

    def start(self, step: Callable[[], bool]) -> None:
        """Has a thread call `step`."""
        self.runs = True
        thread = threading.Thread(target=self._run, args=(step,), name=self._name)
        self._thread = thread  # first: Ctrl-C may come once it runs
        try:
            thread.start()
        except RuntimeError:  # no more threads (`ulimit -u`)
            self.runs, self._thread = False, None

    def join(self) -> None:
        """Waits for the thread to end; something must end `step`."""
        thread = self._thread
        # It may be the thread itself, where Python collects what nobody closed; Ctrl-C may have kept it from starting.
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join()
        self._thread = None
        self.error = None  # breaks a reference cycle

    def _run(self, step: Callable[[], bool]) -> None:
        try:
            with self._as_caller():
                while step():
                    pass
        except BaseException as error:  # for the caller
            self.error = error
        finally:
            self.runs = False
