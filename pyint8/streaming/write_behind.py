"""From tensors on any device to whoever takes their bytes: through a little host memory, on threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from pyint8.host.ending import submit

_PIECE_BYTES = 16 << 20

Pieces = Iterator[memoryview]


class WriteBehind:
    """Hands tensors' bytes on while the caller makes others; a context manager that joins its threads.

    Args:
        threads: How many tensors are written at once; each has 16 MiB of pinned memory for what is on a GPU.
        most_bytes: Of tensors that wait or are being written, as far as one alone does not take more.
    """

    def __init__(self, threads: int, most_bytes: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pyint8 write")
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._bytes = 0
        self._error: BaseException | None = None
        self._local = threading.local()

    def put(self, tensor: torch.Tensor, write: Callable[[Pieces], None]) -> Future[None]:
        """Takes a tensor, whose values are ordered before its device's current stream; waits while there is no room.

        Args:
            tensor: Not to be changed until it is written.
            write: Takes its bytes, row-major, in pieces that are valid until the next; called on another thread.

        Returns:
            Done when it is written.

        Raises:
            BaseException: The first error of any `write`.
        """
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        ready = torch.cuda.current_stream(flat.device).record_event() if flat.is_cuda else None
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(flat.nbytes))
            self._raise()
            self._bytes += flat.nbytes
        future = submit(self._pool, self._write, flat, ready, write)
        future.add_done_callback(self._ended(flat.nbytes))
        return future

    def finish(self) -> None:
        """Waits until all is written.

        Raises:
            BaseException: The first error.
        """
        self._pool.shutdown()
        self._raise()

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _has_room(self, nbytes: int) -> bool:
        return self._error is not None or not self._bytes or self._bytes + nbytes <= self._most_bytes

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _ended(self, nbytes: int) -> Callable[[Future[None]], None]:
        def note(future: Future[None]) -> None:
            with self._changed:
                self._bytes -= nbytes
                if not future.cancelled() and self._error is None:
                    self._error = future.exception()
                self._changed.notify_all()

        return note

    def _write(self, flat: torch.Tensor, ready: torch.cuda.Event | None, write: Callable[[Pieces], None]) -> None:
        self._raise()  # what has failed is not gone on with
        write(_from_host(flat) if ready is None else self._from_gpu(flat, ready))

    def _from_gpu(self, flat: torch.Tensor, ready: torch.cuda.Event) -> Pieces:
        stream, pinned = self._stream(flat.device), self._pinned()
        stream.wait_event(ready)
        for start in range(0, flat.numel(), _PIECE_BYTES):
            piece = flat[start : start + _PIECE_BYTES]
            with torch.cuda.stream(stream):
                pinned[: piece.numel()].copy_(piece, non_blocking=True)
            stream.synchronize()
            yield pinned[: piece.numel()].numpy().data

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        """The thread's own: copies of one do not wait for those of another."""
        streams: dict[torch.device, torch.cuda.Stream] = self._local.__dict__.setdefault("streams", {})
        if device not in streams:
            streams[device] = torch.cuda.Stream(device)
        return streams[device]

    def _pinned(self) -> torch.Tensor:
        if not hasattr(self._local, "pinned"):
            self._local.pinned = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        pinned: torch.Tensor = self._local.pinned
        return pinned


def _from_host(flat: torch.Tensor) -> Pieces:
    for start in range(0, flat.numel(), _PIECE_BYTES):
        yield flat[start : start + _PIECE_BYTES].cpu().numpy().data
