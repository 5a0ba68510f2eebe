"""The journals of one conversion: each process that has a part in it writes its own, and the next attempt reads all."""

from __future__ import annotations

import errno
import os

from pyint8.host.locks import lock, unlock

from ._reading import os_errors
from .journal import Journal

_NAME = ".pyint8-journal"


def journal_file(folder: str, rank: int = 0) -> str:
    """Where a process has its journal: the only one, or one of several by its number."""
    return os.path.join(folder, f"{_NAME}.{rank}" if rank else _NAME)


def gathered(folder: str, identity: str) -> dict[str, int | None] | None:
    """The names that all journals in a folder have, with their checksums; None if there is none of this work.

    Raises:
        BlockingIOError: A process that writes one is alive.
        ReadError: One cannot be read, or the system does not say which there are.
    """
    with os_errors(folder):
        files = _files(folder)
        held = [file for file in files if _is_held(file)]
        own = [Journal.read(file) for file in files if not held and Journal.is_of(file, identity)]
    if held:
        raise BlockingIOError(errno.EWOULDBLOCK, "a process writes it", held[0])
    return {name: checksum for noted in own for name, checksum in noted.items()} if own else None


def remove_others(folder: str) -> None:
    """Removes all journals but that of process 0, which has everything.

    Raises:
        OSError: The operating system refused, be it to say which there are.
    """
    for file in set(_files(folder)) - {journal_file(folder)}:
        os.unlink(file)


def remove_all(folder: str) -> None:
    """As `remove_others`, that one too."""
    for file in _files(folder):
        os.unlink(file)


def _files(folder: str) -> list[str]:
    # glob takes a folder that cannot be looked into for an empty one
    return sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.startswith(_NAME))


def _is_held(file: str) -> bool:
    try:
        locked = lock(file, wait=False)
    except BlockingIOError:
        return True
    if locked is not None:
        unlock(locked)
    return False
