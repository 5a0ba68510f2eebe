"""Advisory locks on files and folders, which a process holds while it lives."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress

from .removal import remove_folder


def lock(path: str, *, shared: bool = False, wait: bool = True) -> int | None:
    """Lock a file or folder; `unlock` gives it back, and so does the end of the process.

    Args:
        path: It must be there.
        shared: Whether others may have it too, who also share it.
        wait: Whether to wait for others.

    Returns:
        The descriptor; None if by now something else is at the path, or nothing.

    Raises:
        BlockingIOError: Another has it, and `wait` is False.
        OSError: It cannot be opened.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(file), os.stat(path)):
            return file
    except FileNotFoundError:
        pass
    except BaseException:
        unlock(file)
        raise
    unlock(file)
    return None


def unlock(locked: int) -> None:
    """Close what `lock` returned. It is unlocked whatever the system answers, and nothing was written by it."""
    with suppress(OSError):
        os.close(locked)


def remove_unlocked(folder: str, locked_by: str | None = None) -> bool:
    """Remove a folder that no process holds.

    Args:
        folder: What to remove.
        locked_by: The file in it that a process would have locked; None for the folder itself.

    Returns:
        Whether it is gone.
    """
    try:
        locked = lock(locked_by or folder, wait=False)
    except OSError:  # a process holds it, or it was removed meanwhile
        return False
    if locked is None:
        return False
    try:
        return remove_folder(folder)
    finally:
        unlock(locked)
