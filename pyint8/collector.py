"""Python's garbage collector, held off while a model is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from pyint8.imports import imported


@contextmanager
def held_off() -> Iterator[None]:
    """Collects nothing while it lasts, in any thread, and afterwards as before.

    Modules and configurations are many objects at once, all of which stay. They make Python look through everything
    that lives, for nothing: 0.15 to 0.2 s with torch and transformers imported, once or twice in a load. What a load
    leaves behind goes by its reference counts. So afterwards what came is taken for old, as if it had been looked
    through (0.13 s where a load imported torch and transformers).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if not gc.get_freeze_count():  # else what somebody froze would thaw
                gc.freeze()
                gc.unfreeze()  # to the oldest generation
            gc.enable()


def make_room(nbytes: int) -> None:
    """Collects once if memory is in use on a GPU that has less than `nbytes` free.

    A model with accelerate's hooks is a cycle: deleted, it keeps its memory until it is found.
    """
    torch = imported("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    for gpu in range(torch.cuda.device_count()):
        if torch.cuda.memory_allocated(gpu) and torch.cuda.mem_get_info(gpu)[0] < nbytes:
            gc.collect()
            return
