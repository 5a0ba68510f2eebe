"""Writing, and the operating system's refusals of it as errors that say what to do."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from pyint8.errors import Pyint8Error, WriteError

_FREE_SPACE = "free some space, or choose a folder on another disk; nothing was left half-written"
_ADVICE = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "its file system holds no files of that size; choose another folder, or a smaller max_shard_size",
    errno.EACCES: "give this user permission to write there, or choose another folder",
    errno.EPERM: "give this user permission to write there, or choose another folder",
    errno.EROFS: "its file system is read-only; choose another folder",
    errno.EEXIST: "a file is in the way; choose another folder",
    errno.ENOTDIR: "a file is in the way; choose another folder",
    errno.EBUSY: "it is the root of a file system, and cannot be replaced; choose a folder inside of it",
}


def create(path: str, *, keep: bool = False) -> int:
    """A descriptor of a file to write to (and to read from); made if it is not there.

    Args:
        path: Of the file.
        keep: Whether what is in it stays.

    Raises:
        OSError: The operating system refused.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe without a reader is refused
    return os.open(path, flags | (0 if keep else os.O_TRUNC), 0o666)


def sync(path: str) -> None:
    """Returns once a file, or the names in a folder, are on the disk.

    Raises:
        OSError: The operating system refused.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def write_errors(path: str | os.PathLike[str], tensor: str | None = None) -> Iterator[None]:
    """Turn the operating system's errors within into `WriteError` with its errno.

    Args:
        path: The file or folder that is being written; a folder above it or a file in it is named if the error is its.
        tensor: Whose bytes are being written.
    """
    try:
        yield
    except Pyint8Error:
        raise
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "check the disk, then try again")
        problem = f"cannot be written: {error.strerror or error}; {advice}"
        raise WriteError(
            problem, path=_culprit(error.filename, os.fspath(path)), tensor=tensor, errno=error.errno
        ) from error


def _culprit(named: object, path: str) -> str:
    """What to name: not a temporary file beside, whose name says nothing to anyone."""
    if not isinstance(named, str) or os.path.isabs(named) != os.path.isabs(path):
        return path
    return named if os.path.commonpath([named, path]) in (named, path) else path
