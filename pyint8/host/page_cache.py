"""Which parts of a file are in the page cache, determined without filling it."""

from __future__ import annotations

import os
from collections.abc import Iterator

from pyint8.host.files import open_file

# How many places of a file are looked at before it is searched for cold parts.
_SAMPLES = 16


def cold_steps(path: str, step: int) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of those steps of a file, of `step` bytes each, whose last byte is not in the page cache.

    All of a step is taken to be as its last byte is. (Asking for a byte may make the kernel read what follows it, so
    the first byte of the next step would say nothing.)

    Raises:
        OSError: The file cannot be opened, or is none (`ReadError`).
    """
    with open_file(path) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        sampled = range(0, size, max(1, size // _SAMPLES))
        if all(is_cached(descriptor, offset) for offset in sampled):
            return
        for offset in range(0, size, step):
            nbytes = min(step, size - offset)
            if not is_cached(descriptor, offset + nbytes - 1):
                yield offset, nbytes


def is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte can be read without waiting; True also where the file system cannot say."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
