"""The journals of one conversion: each process that has a part in it writes its own, and the next attempt reads all."""

from __future__ import annotations

import glob
import os

from pyint8.host.locks import lock

from .journal import Journal

_NAME = ".pyint8-journal"


def journal_file(folder: str, rank: int = 0) -> str:
    """Where a process has its journal: the only one, or one of several by its number."""
    return os.path.join(folder, f"{_NAME}.{rank}" if rank else _NAME)


def gathered(folder: str, identity: str) -> dict[str, int | None] | None:
    """The names that all journals in a folder have, with their checksums; None if there is none of this work.

    Raises:
        BlockingIOError: A process that writes one is alive.
        OSError: One cannot be read.
    """
    files = _files(folder)
    for file in files:
        _require_unlocked(file)
    own = [Journal.read(file) for file in files if Journal.is_of(file, identity)]
    return {name: checksum for noted in own for name, checksum in noted.items()} if own else None


def remove_others(folder: str) -> None:
    """Removes all journals but that of process 0, which has everything."""
    for file in set(_files(folder)) - {journal_file(folder)}:
        os.unlink(file)


def remove_all(folder: str) -> None:
    for file in _files(folder):
        os.unlink(file)


def _files(folder: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(folder), f"{_NAME}*")))


def _require_unlocked(file: str) -> None:
    locked = lock(file, wait=False)
    if locked is not None:
        os.close(locked)
