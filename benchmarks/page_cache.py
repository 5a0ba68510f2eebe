"""What of a file is in the page cache: asked (mincore), filled, and emptied, and checked afterwards."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_CHUNK = 1 << 24
_TRIES = 3  # another process that gives its memory back changes what is kept


def resident_bytes(path: Path) -> int:
    """Bytes of the file that are in the page cache, without touching them."""
    size = path.stat().st_size
    if size == 0:
        return 0
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=2) as view,
    ):
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        answer = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(view)
        try:
            if _libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), answer) != 0:
                raise OSError(ctypes.get_errno(), "mincore", str(path))
        finally:
            del start
        return min(size, sum(page & 1 for page in answer) * mmap.PAGESIZE)


def residency(files: Iterable[Path]) -> float:
    """The part of the files' bytes that is in the page cache, 0 to 1."""
    files = list(files)
    return sum(map(resident_bytes, files)) / max(1, sum(path.stat().st_size for path in files))


def fill(files: Iterable[Path], part: float = 1.0) -> None:
    """Reads the first `part` of every file."""
    for path in files:
        left = int(path.stat().st_size * part)
        with path.open("rb", buffering=0) as file:
            while left > 0 and (chunk := file.read(min(left, _CHUNK))):
                left -= len(chunk)


def evict(files: Iterable[Path]) -> None:
    """Writes back and drops the files' pages; pages that are mapped, or that the kernel keeps, stay."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def prepare(files: Iterable[Path], state: str) -> float:
    """Makes the cache "hot", "half" or "cold" for the files; returns the residency that was then measured.

    Raises:
        RuntimeError: It is not what was asked for, so a measurement would be of something else.
    """
    files = list(files)
    low, high = {"hot": (0.99, 1.0), "half": (0.3, 0.7), "cold": (0.0, 0.01)}[state]
    for _ in range(_TRIES):
        if state != "hot":
            evict(files)
        fill(files, {"hot": 1.0, "half": 0.5, "cold": 0.0}[state])
        found = residency(files)
        if low <= found <= high:
            return found
    raise RuntimeError(f"the page cache holds {found:.1%} of the files; {state} was asked for")
