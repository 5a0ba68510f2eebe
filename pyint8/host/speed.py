"""How fast files can be read here: out of the page cache, and from the disk."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle

from pyint8.host.files import open_unbuffered

_GB = 1e9
_PIECE = 2 << 20
_BUFFERS = 3

Path = str | os.PathLike[str]


def read_by_threads(files: Sequence[Path], threads: int, *, direct: bool = False, limit: int | None = None) -> float:
    """GB/s of `threads` that read pieces of 2 MiB into three buffers each, a ring that stays in the CPU's cache.

    From the page cache, it is what can be put into pinned memory; from a cold file, what the disk gives.

    Args:
        files: Regular files.
        threads: How many read.
        direct: Past the page cache (O_DIRECT).
        limit: The most bytes to read.

    Raises:
        OSError: A file cannot be opened or read, as where the file system knows no O_DIRECT.
    """
    with ExitStack() as stack:
        pieces = list(_pieces(files, os.O_DIRECT if direct else 0, stack))[: _most(limit)]
        reader = _Reader(pieces)
        seconds = _seconds_of([threading.Thread(target=reader.read) for _ in range(threads)])
        if reader.errors:
            raise reader.errors[0]
        return sum(reader.nbytes) / seconds / _GB


class _Reader:
    """Threads take its pieces in order."""

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self._todo = iter(pieces)
        self._lock = threading.Lock()
        self.nbytes: list[int] = []
        self.errors: list[OSError] = []

    def read(self) -> None:
        buffers = cycle([mmap.mmap(-1, _PIECE) for _ in range(_BUFFERS)])  # O_DIRECT wants whole pages
        nbytes = 0
        try:
            while (piece := self._next()) is not None:
                nbytes += os.preadv(piece[0], [next(buffers)], piece[1])
        except OSError as error:
            self.errors.append(error)
        self.nbytes.append(nbytes)

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            return next(self._todo, None)


def _pieces(files: Sequence[Path], flags: int, stack: ExitStack) -> Iterator[tuple[int, int]]:
    """(descriptor, offset) of every whole piece, and of the first of a smaller file."""
    for path in files:
        descriptor = stack.enter_context(open_unbuffered(path, flags)).fileno()
        size = os.fstat(descriptor).st_size
        yield from ((descriptor, offset) for offset in range(0, size // _PIECE * _PIECE or 1, _PIECE))


def _most(limit: int | None) -> int | None:
    return None if limit is None else max(1, limit // _PIECE)


def _seconds_of(workers: Sequence[threading.Thread]) -> float:
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def takes_direct_reads(file: Path) -> bool:
    """Whether a file can be read past the page cache."""
    try:
        read_by_threads([file], 1, direct=True, limit=_PIECE)
    except OSError:
        return False
    return True


def drop_from_cache(file: Path) -> None:
    """Writes a file's pages back, and asks the kernel to forget them."""
    with open_unbuffered(file) as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
