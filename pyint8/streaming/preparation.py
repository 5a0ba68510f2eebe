"""What runs before there is a model: the page cache is filled, and the first tensors are read."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pyint8.streaming.prefetch import PageCachePrefetch

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint
    from pyint8.config import StreamOptions
    from pyint8.placement.budget import MemoryBudget
    from pyint8.streaming.guesses import Guess
    from pyint8.streaming.head_start import Begun, HeadStart
    from pyint8.streaming.ranks.ranks import Ranks
    from pyint8.streaming.requests import TensorRequest


class Preparation:
    """Owned by the load; as a context manager it stops everything that was not taken over.

    Args:
        checkpoint: The checkpoint, if it is known yet; from now on its cold parts are read into the page cache.
        options: How to move bytes.
        ranks: Those that load together. Nothing is read into the page cache for them: each would read everything.
        opened: A head start for the device map of the load, or for the model's GPUs, that knows of no tensors yet.

    Attributes:
        checkpoint: As given.
        options: As given.
        ranks: As given.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None,
        options: StreamOptions,
        ranks: Ranks | None = None,
        opened: HeadStart | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.options = options
        self.ranks = ranks
        reads_ahead = checkpoint if ranks is None else None
        self._prefetch = None if reads_ahead is None else PageCachePrefetch(reads_ahead, options)
        self._head_start = opened

    def __enter__(self) -> Preparation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_prefetch()
        if self._head_start is not None:
            self._head_start.close()

    def start_head_start(self, device_map: Any, budget: MemoryBudget, guess: Guess | None = None) -> None:
        """Requests the first tensors, if it is known where they go, and what experts are guessed to become; imports
        torch."""
        from pyint8.streaming.first_tensors import first_tensors, open_head_start

        if self.checkpoint is None:
            return
        is_bounded = budget.per_device is not None
        if self._head_start is None:
            self._head_start = open_head_start(device_map, self.options, self.ranks, is_bounded=is_bounded)
        if self._head_start is not None:
            own_guess = guess if self.ranks is None else None  # ranks share out what a plan asks for
            parts = first_tensors(self.checkpoint, device_map, is_bounded=is_bounded, guess=own_guess)
            self._head_start.begin(parts)

    @property
    def reserves_memory(self) -> bool:
        """Whether the head start reserved the GPU's memory; known once its transport is taken."""
        return self._head_start is not None and self._head_start.reserves

    def stop_prefetch(self) -> None:
        """Stops filling the page cache: the stream reads everything from now on. Idempotent."""
        if self._prefetch is not None:
            self._prefetch.close()

    def take_over(self, gpus: int, wanted: Iterable[TensorRequest] = ()) -> Begun:
        """The transport, now the caller's to close, and what is under way.

        Args:
            gpus: How many GPUs tensors will land on.
            wanted: What the plan of the load asks for.

        Raises:
            FileChangedError: A file is not the one whose header was read.
            ReadError: A file cannot be opened.
            DeviceError: The driver refuses, or memory cannot be pinned.
        """
        from pyint8.streaming.head_start import Begun
        from pyint8.streaming.transport import Transport

        if self._head_start is not None:
            return self._head_start.take(wanted)
        if self.ranks is not None:
            return Begun(self.ranks.transport(self.options), {})
        return Begun(Transport(self.options, gpus=gpus), {})
