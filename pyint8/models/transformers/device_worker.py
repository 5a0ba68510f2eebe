"""Parameters for several GPUs, made in parallel, though transformers' loop asks for one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from pyint8.models.transformers.compat import SkipParameters
from pyint8.streaming.caller import as_caller

Made = dict[str, torch.Tensor]


class DeviceWorker:
    """Makes the parameters of one device in a thread, in order; they are taken by name.

    Args:
        device: The device.
        names: The targets, in order.
        make: Makes one target; called in the thread, with the caller's current stream of `device`.
    """

    def __init__(self, device: torch.device, names: Iterable[str], make: Callable[[str], Made]) -> None:
        self._made: dict[str, Made | SkipParameters] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._stopped = False
        self._make, entered = make, as_caller([device])
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, args=(entered, list(names), make), name=f"pyint8 {device}"
        )
        try:
            self._thread.start()
        except RuntimeError:  # no more threads (`ulimit -u`): `take` makes the targets itself
            self._thread = None

    def take(self, name: str) -> Made:
        """The parameters of the target `name`; waits until they are made.

        Raises:
            SkipParameters: Its conversion failed.
            Exception: The error that stopped the thread (or of making it, where there is none).
        """
        if self._thread is None:
            with torch.no_grad():
                return self._make(name)
        with self._changed:
            self._changed.wait_for(lambda: name in self._made or self._error is not None)
            made = self._made.pop(name, None)
        if made is None:
            assert self._error is not None
            raise self._error
        if isinstance(made, SkipParameters):
            raise made
        return made

    def stop(self) -> None:
        """Starts no other target; the current one ends with the stream, which must be closed before `join`."""
        self._stopped = True

    def join(self) -> None:
        """Waits for the thread to end, and discards parameters that were not taken."""
        # It may be the thread itself, where Python collects what nobody closed.
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._made.clear()
        self._error = None  # breaks a reference cycle

    def _run(
        self, entered: Callable[[], AbstractContextManager[None]], names: list[str], make: Callable[[str], Made]
    ) -> None:
        try:
            with entered():
                for name in names:
                    if self._stopped:
                        return
                    self._note(name, self._one(name, make))
        except BaseException as error:  # raised by `take`
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _one(self, name: str, make: Callable[[str], Made]) -> Made | SkipParameters:
        try:
            return make(name)
        except SkipParameters as error:  # transformers has noted why, and goes on
            return error

    def _note(self, name: str, made: Made | SkipParameters) -> None:
        with self._changed:
            self._made[name] = made
            self._changed.notify_all()
