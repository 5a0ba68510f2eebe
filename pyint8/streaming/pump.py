"""A thread that does the same again and again, for as long as there is something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from pyint8.streaming.caller import as_caller


class Pump:
    """Calls `step` in a thread, with the caller's current stream of a device, until it returns False or fails.

    Args:
        device: The device.
        step: What is done.

    Attributes:
        runs: Whether the thread does it; where none can be had, the caller has to.
        error: What stopped it; None so far.
    """

    def __init__(self, device: torch.device, step: Callable[[], bool]) -> None:
        self.runs = False
        self.error: BaseException | None = None
        arguments = (as_caller([device]), step)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"pyint8 pump {device}")

    def start(self) -> None:
        self.runs = True
        try:
            self._thread.start()
        except RuntimeError:  # no more threads (`ulimit -u`)
            self.runs = False

    def join(self) -> None:
        """Waits for the thread to end; something must end `step`."""
        # It may be the thread itself, where Python collects what nobody closed.
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.error = None  # breaks a reference cycle

    def _run(self, entered: Callable[[], AbstractContextManager[None]], step: Callable[[], bool]) -> None:
        try:
            with entered():
                while step():
                    pass
        except BaseException as error:  # for the caller
            self.error = error
        finally:
            self.runs = False
