"""Whether a file is still the one whose header was read: it may be replaced, or written to, during a load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from pyint8.errors import FileChangedError


class FileStamp(NamedTuple):
    """What distinguishes one state of a file from another; the extension compares it too.

    It cannot distinguish states within one tick of the file system's clock (milliseconds; a second on some network file
    systems). File systems in user space may change a file's inode number when memory is short: such a load is refused
    once, without need.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int


def stamp_of(file: str | int) -> FileStamp:
    """The state of a file now, by its path or an open descriptor of it.

    Raises:
        OSError: The operating system refused.
    """
    status = os.stat(file)
    return FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def has_changed(path: str, stamp: FileStamp) -> bool:
    """Whether a path is not, or no longer, that of a file in this state."""
    try:
        return stamp_of(path) != stamp
    except OSError:
        return True


def changed(path: str) -> FileChangedError:
    return FileChangedError("the file changed while it was loaded; load it again, once nothing writes to it", path=path)


@contextmanager
def reading(path: str, file: BinaryIO) -> Iterator[FileStamp]:
    """Reads from an open file, whose state must be the same at the end.

    Raises:
        FileChangedError: It is not.
    """
    stamp = stamp_of(file.fileno())
    yield stamp
    if stamp_of(file.fileno()) != stamp:
        raise changed(path)
