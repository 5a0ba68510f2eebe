"""Python's garbage collector, paused while a model is made."""

from __future__ import annotations

import gc
from collections import deque
from contextlib import AbstractContextManager
from operator import methodcaller

from pyint8.host.imports import imported
from pyint8.host.settings import SharedSetting


def paused() -> AbstractContextManager[None]:
    """Pauses the collector in all threads while the block lasts.

    A load makes many objects, all of which stay; Python would traverse everything alive again and again, and free
    nothing (docs/performance.md, "The garbage collector"). Objects made in the block go to the oldest generation, as if
    they had been traversed.
    """
    return _collector.changed()


def _resume(was_on: bool) -> None:
    if was_on:
        try:
            _move_to_oldest_generation()
        finally:  # there may be no memory for it
            gc.enable()


def _resume_in_child(was_on: bool) -> None:
    if was_on:
        gc.enable()


def _move_to_oldest_generation() -> None:
    if gc.get_freeze_count():  # unfreeze() would also release objects frozen by others
        return
    # Both by one call that no signal interrupts, or everything could stay frozen.
    deque(map(methodcaller("__call__"), (gc.freeze, gc.unfreeze)), maxlen=0)


_collector = SharedSetting(gc.isenabled, lambda _: gc.disable(), _resume, _resume_in_child)


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
