"""Filling the page cache from the disk while there is nothing else to do with a checkpoint yet: heavy imports take
seconds, and so does a cold disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pyint8.host.memory import available_memory
from pyint8.streaming.extension import _core

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint
    from pyint8.config import StreamOptions

# What is read, or not, as a whole: where its last byte is cached, all of it is taken to be. (Asking for a byte may make
# the kernel read what comes behind it, so the first byte of the next step tells nothing.)
_STEP = 4 << 20
# How many places of a file are looked at before it is searched for cold parts.
_SAMPLES = 16


class PageCachePrefetch:
    """Reads what is cold of a checkpoint, in the order of its files, until it is closed; nothing if all is cached.

    Reading leaves no trace but the page cache, and takes at most half of the memory that is available for it. Errors
    of reading are nobody's here: whoever needs the bytes will meet them.

    Raises:
        FileChangedError: A file is not the one any more whose header was read.
    """

    def __init__(self, checkpoint: Checkpoint, options: StreamOptions) -> None:
        self._engine: _core.Engine | None = None
        left = 0 if options.direct_io else available_memory() // 2
        for path, stamp in checkpoint.stamps.items():
            reads = [(offset, nbytes) for offset, nbytes in _cold_steps(path) if (left := left - nbytes) >= 0]
            if not reads:
                continue
            if self._engine is None:
                self._engine = _core.Engine(
                    threads=options.worker_threads(), slots_per_thread=1, slot_bytes=_STEP, direct_io=False
                )
                lane = self._engine.add_discarding_device()
            file = self._engine.add_file(os.fsencode(path), stamp)
            self._engine.submit(lane, [(file, offset, nbytes, 0) for offset, nbytes in reads], 0, False)

    @property
    def is_reading(self) -> bool:
        """Whether there was anything to read."""
        return self._engine is not None

    def close(self) -> None:
        """Stop reading and join the workers. Idempotent."""
        if self._engine is not None:
            self._engine.close()


def _cold_steps(path: str) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the steps of a file whose last byte is not in the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        sampled = range(0, size, max(1, size // _SAMPLES))
        if all(_is_cached(descriptor, offset) for offset in sampled):
            return
        for offset in range(0, size, _STEP):
            nbytes = min(_STEP, size - offset)
            if not _is_cached(descriptor, offset + nbytes - 1):
                yield offset, nbytes
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, offset: int) -> bool:
    """Whether a byte can be had without waiting; True also where the file system cannot tell."""
    try:
        os.preadv(descriptor, [bytearray(1)], offset, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
