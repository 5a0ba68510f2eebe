"""Python's garbage collector, paused while a model is made."""

from __future__ import annotations

import gc
import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller

from pyint8.host.imports import imported


class _Pauses:
    """The blocks during which the collector is paused, in any thread: the last to end switches it on again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._blocks: set[object] = set()
        self._was_on = False

    def begin(self, block: object) -> None:
        with self._lock:
            if not self._blocks:
                self._was_on = gc.isenabled()
            self._blocks.add(block)
            gc.disable()

    def end(self, block: object) -> None:
        """Idempotent, also if an earlier call was interrupted anywhere."""
        with self._lock:
            self._blocks.discard(block)
            if self._was_on and not self._blocks:
                _move_to_oldest_generation()
                gc.enable()
                self._was_on = False

    def forget(self) -> None:
        """In a forked child, where the other threads' blocks never end."""
        self._lock = threading.RLock()
        self._blocks.clear()
        if self._was_on:
            gc.enable()
        self._was_on = False


_pauses = _Pauses()
os.register_at_fork(after_in_child=_pauses.forget)


@contextmanager
def paused() -> Iterator[None]:
    """Pauses the collector in all threads while the block lasts.

    A load makes many objects, all of which stay; Python would traverse everything alive again and again, and free
    nothing (docs/performance.md, "The garbage collector"). Objects made in the block go to the oldest generation, as if
    they had been traversed.
    """
    block = object()
    try:
        try:
            _pauses.begin(block)
            yield
        finally:
            _pauses.end(block)
    finally:  # again: Ctrl-C may have come in between
        _pauses.end(block)


def _move_to_oldest_generation() -> None:
    if gc.get_freeze_count():  # unfreeze() would also release objects frozen by others
        return
    # Both by one call that no signal interrupts, or everything could stay frozen.
    deque(map(methodcaller("__call__"), (gc.freeze, gc.unfreeze)), maxlen=0)


def collect_if_short(nbytes: int) -> None:
    """Collects once if memory is in use on a GPU that has less than `nbytes` free.

    A model with accelerate's hooks is a reference cycle: deleted, it keeps its memory until it is collected.
    """
    torch = imported("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    for gpu in range(torch.cuda.device_count()):
        if torch.cuda.memory_allocated(gpu) and torch.cuda.mem_get_info(gpu)[0] < nbytes:
            gc.collect()
            return
