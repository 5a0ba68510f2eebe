"""A thread that does the same again and again, for as long as there is something to do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class Pump:
    """Calls `step` in a thread, with the caller's current stream of a device, until it returns False or fails.

    Args:
        device: The device.
        step: What is done.

    Attributes:
        error: What stopped it; None so far.
    """

    def __init__(self, device: torch.device, step: Callable[[], bool]) -> None:
        self.error: BaseException | None = None
        where: Any = nullcontext()
        if device.type == "cuda":  # a thread begins on the default stream
            where = torch.cuda.stream(torch.cuda.current_stream(device))
        self._thread: threading.Thread | None = None
        thread = threading.Thread(target=self._run, args=(where, step), name=f"pyint8 pump {device}")
        try:
            thread.start()
        except RuntimeError:  # no more threads (`ulimit -u`): the caller does it when it comes to it
            return
        self._thread = thread

    def join(self) -> None:
        """Waits for the thread to end; something must end `step`."""
        if self._thread is not None:
            self._thread.join()
        self.error = None  # breaks a reference cycle

    def _run(self, where: Any, step: Callable[[], bool]) -> None:
        try:
            with where, torch.no_grad():
                while step():
                    pass
        except BaseException as error:  # for the caller
            self.error = error
