"""The one door through which Python code opens files: what is no regular file is refused instead of waited for."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader, FileIO
from typing import Any, BinaryIO, TypeVar

from pyint8.errors import ReadError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}

# What transformers and PEFT open in a folder, apart from tokenizers.
_OPENED = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".py")

# What the system answers about a name that leads nowhere.
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_Found = TypeVar("_Found", int, bytes)
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading, in binary (see `open_unbuffered`).

    Raises:
        ReadError: It is a pipe, a device, a socket or a folder.
        OSError: The operating system refused.
    """
    return BufferedReader(open_unbuffered(path))


class _RegularFile(FileIO):
    """One whose reads bring bytes or raise: Python's give None where a lock of another program is in the way."""

    def readinto(self, buffer: Any, /) -> int:
        found: int | None = super().readinto(buffer)
        return _told(found)

    def readall(self) -> bytes:
        found: bytes | None = super().readall()
        return _told(found)


def _told(found: _Found | None) -> _Found:
    if found is None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return found


def open_unbuffered(path: str | os.PathLike[str], flags: int = 0) -> FileIO:
    """Open a regular file for reading by its descriptor.

    A pipe without a writer would block, and a device may give bytes without end: neither is opened, or, if it takes the
    place of a file that very moment, only until it is seen. Links are followed. (Python itself retries what
    a signal interrupts.)

    Args:
        path: The file.
        flags: Further ones for the system's `open`, such as O_DIRECT.

    Raises:
        ReadError: It is a pipe, a device, a socket or a folder.
        OSError: The operating system refused.
    """
    require_regular(path, os.stat(path).st_mode)
    # By one call, which no signal interrupts: between two, Ctrl-C could leave the descriptor open.
    raw = next(map(_RegularFile, map(os.open, [path], [_FLAGS | flags])))
    try:
        require_regular(path, os.fstat(raw.fileno()).st_mode)
        os.set_blocking(raw.fileno(), True)
        return raw
    except BaseException:
        raw.close()
        raise


def exists(path: str | os.PathLike[str], *, follow: bool = True) -> bool:
    """Whether something has this name; unlike Python's own question, says so if that cannot be told.

    Args:
        path: What is looked for; a string with NUL in it is nothing.
        follow: Whether a link that leads nowhere counts as nothing.

    Raises:
        ReadError: The operating system refused, as on a disk that fails.
    """
    return _mode(path, follow=follow) is not None


def is_file(path: str | os.PathLike[str]) -> bool:
    """As `exists`, of a regular file."""
    return stat.S_ISREG(_mode(path) or 0)


def is_folder(path: str | os.PathLike[str]) -> bool:
    """As `exists`, of a folder."""
    return stat.S_ISDIR(_mode(path) or 0)


def _mode(path: str | os.PathLike[str], *, follow: bool = True) -> int | None:
    try:
        return os.stat(path, follow_symlinks=follow).st_mode
    except ValueError:
        return None
    except OSError as error:
        if error.errno in _ABSENT:
            return None
        problem = f"cannot be looked at: {error.strerror or error}; check the disk and its permissions, then try again"
        raise ReadError(problem, path=path, errno=error.errno) from error


def require_regular(path: str | os.PathLike[str], mode: int) -> None:
    """Refuse what a file's mode says is no regular file.

    Raises:
        ReadError: It is none.
    """
    kind = stat.S_IFMT(mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise ReadError(
            f"this is {_KINDS.get(kind, 'something else')} and no file; put the file itself there",
            path=path,
            errno=number,
        )


def require_files(folder: str) -> None:
    """Refuse a folder in which a pipe, a device or a socket has the name of a file that a load may open.

    transformers opens its files (configurations, code, adapters) by their paths, without looking at what they are.

    Raises:
        ReadError: There is one.
        OSError: The operating system refused.
    """
    with os.scandir(folder) as found:
        special = [each for each in found if each.name.endswith(_OPENED) and not each.is_file() and not each.is_dir()]
    for each in special:
        if exists(each.path):  # a link that leads nowhere is reported by whoever needs it
            require_regular(each.path, each.stat().st_mode)
