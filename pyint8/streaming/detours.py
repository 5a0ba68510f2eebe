"""Other GPUs' buses, over which bytes reach a GPU too (`StreamOptions.borrow_gpus`)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from pyint8.errors import CancelledError, OptionError, Pyint8Error
from pyint8.streaming.extension import _core

if TYPE_CHECKING:
    from pyint8.config import StreamOptions

logger = logging.getLogger(__name__)

# Of a borrowed GPU.
_MOST_STAGING_BYTES = 128 << 20


def check_staging(options: StreamOptions, threads: int) -> None:
    """Raises OptionError where the slots of those who take another GPU's bus are too much memory to take there."""
    takers = -(-threads // 2)  # as if only one could be borrowed: whether more can is not known yet
    nbytes = takers * options.slots_per_thread * options.slot_size(threads)
    if nbytes > _MOST_STAGING_BYTES:
        raise OptionError(
            f"borrow_gpus could take {nbytes} bytes of a GPU, {_MOST_STAGING_BYTES} at most; make threads, "
            "slots_per_thread or slot_bytes smaller"
        )


class Detours:
    """Opened in a thread, as to make a context on a GPU that nobody uses takes a tenth of a second.

    What does not open is left out, with a warning. The engine gives them back.

    Args:
        engine: The extension's.
        lane: The engine's number of a GPU's lane.
        gpu: The number of that GPU.
        neighbours: Numbers of others; the GPU itself is not one.
        library: The driver library.
    """

    def __init__(self, engine: _core.Engine, lane: int, gpu: int, neighbours: Sequence[int], library: str) -> None:
        self._engine = engine
        self._lane = lane
        self._gpu = gpu
        self._neighbours = [neighbour for neighbour in neighbours if neighbour != gpu]
        self._library = library
        self._thread: threading.Thread | None = threading.Thread(target=self._open, name="pyint8 detours")
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            self._thread = None
            self._warn((neighbour, str(error)) for neighbour in self._neighbours)

    def join(self) -> None:
        """Waits until they are open, or the engine was closed before."""
        if self._thread is not None:
            self._thread.join()

    def _open(self) -> None:
        try:
            refused = self._engine.add_detours(self._lane, self._gpu, self._neighbours, self._library)
        except CancelledError:
            return
        except Pyint8Error as error:
            refused = [(neighbour, str(error)) for neighbour in self._neighbours]
        self._warn(refused)

    def _warn(self, refused: Iterable[tuple[int, str]]) -> None:
        for neighbour, reason in refused:
            logger.warning("no bytes for GPU %d take the bus of GPU %d: %s", self._gpu, neighbour, reason)
