"""Reads a cold checkpoint into the page cache while heavy imports run: both take seconds."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from pyint8.host.memory import available_memory
from pyint8.host.page_cache import cold_steps
from pyint8.remote.objects import remote_object
from pyint8.streaming.extension import _core, open_engine

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint
    from pyint8.config import StreamOptions

# What is read, or not, as a whole.
_STEP = 4 << 20


class PageCachePrefetch:
    """Reads what is cold of a checkpoint, in the order of its files, until it is closed; nothing if all is cached.

    Nothing is kept but what the page cache keeps, and that takes at most half of the memory that is available. Errors
    of reading are ignored: the load itself reports them.

    Raises:
        FileChangedError: A file is not the one any more whose header was read.
    """

    def __init__(self, checkpoint: Checkpoint, options: StreamOptions) -> None:
        self._engine: _core.Engine | None = None
        left = 0 if options.direct_io else available_memory() // 2
        with suppress(OSError):  # the load itself meets it again, and says what to do
            self._begin(checkpoint, options, left)

    def _begin(self, checkpoint: Checkpoint, options: StreamOptions, left: int) -> None:
        for path, stamp in checkpoint.stamps.items():
            if remote_object(path) is not None:  # nothing of it is here
                continue
            reads = [(offset, nbytes) for offset, nbytes in cold_steps(path, _STEP) if (left := left - nbytes) >= 0]
            if not reads:
                continue
            if self._engine is None:
                self._engine = open_engine(
                    threads=options.worker_threads(), slots_per_thread=1, slot_bytes=_STEP, direct_io=False
                )
                lane = self._engine.add_discarding_device()
            file = self._engine.add_file(os.fsencode(path), stamp)
            self._engine.submit(lane, [(file, offset, nbytes, 0) for offset, nbytes in reads], 0, first=False)

    @property
    def is_reading(self) -> bool:
        """Whether there was anything to read."""
        return self._engine is not None

    def close(self) -> None:
        """Stop reading and join the workers. Idempotent."""
        if self._engine is not None:
            self._engine.close()
