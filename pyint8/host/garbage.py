"""Python's garbage collector, paused while a model is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from pyint8.host.imports import imported


@contextmanager
def paused() -> Iterator[None]:
    """Collects nothing while it lasts, in any thread, and afterwards as before.

    A load makes many objects at once, all of which stay; for each part of them Python would traverse everything that
    lives, and find nothing (docs/performance.md, "The garbage collector"). What has come meanwhile goes to the oldest
    generation, as if it had been traversed.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # unfreeze() would also release objects frozen by others
                gc.freeze()
                gc.unfreeze()  # to the oldest generation
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
