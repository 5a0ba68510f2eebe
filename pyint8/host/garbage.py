"""Python's garbage collector, paused while a model is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from pyint8.host.imports import imported


@contextmanager
def paused() -> Iterator[None]:
    """Pauses the collector in all threads while the block lasts.

    A load makes many objects, all of which stay; Python would traverse everything alive again and again, and free
    nothing (docs/performance.md, "The garbage collector"). Objects made in the block go to the oldest generation, as if
    they had been traversed.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # unfreeze() would also release objects frozen by others
                gc.freeze()
                gc.unfreeze()  # moves all to the oldest generation
            gc.enable()


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
