"""A folder of int8 forms of checkpoints: each whole and sound, or not there; the least recently used go first."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from pyint8.errors import Pyint8Error, ReadError
from pyint8.host.files import exists, is_folder, open_file
from pyint8.host.locks import lock, remove_unlocked, unlock

from ._reading import os_errors
from .identity import identity_of
from .index import Checkpoint, open_checkpoint

logger = logging.getLogger(__name__)

_SEAL = ".pyint8-cache.json"


@dataclass(frozen=True)
class CacheEntry:
    """One int8 form.

    Attributes:
        folder: Where it is: a checkpoint like any other.
        source: The folder or hub id that it was made from.
        nbytes: What its files take.
        used: When it was last used, in seconds since 1970.
    """

    folder: str
    source: str
    nbytes: int
    used: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class CacheFolder:
    """Entries by key, each a folder of its own.

    Args:
        root: Where they are; made when the first one is.
        most_bytes: That all of them may take.

    Attributes:
        root: As given, absolute.
    """

    def __init__(self, root: str, most_bytes: int) -> None:
        self.root = os.path.abspath(root)
        self._most_bytes = most_bytes

    def folder(self, key: str) -> str:
        """Where the entry of a key is, or would be."""
        return os.path.join(self.root, key)

    def entries(self) -> list[CacheEntry]:
        """All that are whole, the least recently used first.

        Raises:
            ReadError: The folder cannot be looked into.
        """
        found = (_entry(folder.path) for folder in self._folders() if not folder.name.startswith("."))
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.used)

    @contextmanager
    def opened(self, key: str) -> Iterator[Checkpoint | None]:
        """The checkpoint of an entry, which stays while the block lasts; None if there is none that is sound.

        One that is not as it was made (another size, time or header) is removed, with a warning; one that cannot be
        read, so that nobody can tell, is left as it is.
        """
        folder = self.folder(key)
        try:
            sealed = lock(os.path.join(folder, _SEAL), shared=True)
        except OSError:
            sealed = None
        if sealed is None:
            yield None
            return
        try:
            checkpoint = _sound(folder)
            if checkpoint is not None:
                with suppress(OSError):  # where it may only be read
                    os.utime(sealed)
            yield checkpoint
        finally:
            unlock(sealed)

    def make_room(self, nbytes: int) -> bool:
        """Removes entries that are not in use, the least recently used first, until so much more may be there.

        Returns:
            False if that cannot be.
        """
        entries = self.entries()
        taken = sum(entry.nbytes for entry in entries)
        for entry in entries:
            if taken + nbytes <= self._most_bytes:
                break
            if nbytes <= self._most_bytes and _removed(entry.folder):
                taken -= entry.nbytes
        return taken + nbytes <= self._most_bytes

    def clear(self) -> list[CacheEntry]:
        """Removes all entries that are not in use, and what unfinished ones left; returns those removed.

        Raises:
            ReadError: The folder cannot be looked into.
        """
        removed = [entry for entry in self.entries() if _removed(entry.folder)]
        for folder in self._folders():
            if folder.is_dir(follow_symlinks=False) and _entry(folder.path) is None:
                _removed(folder.path)
        return removed

    def _folders(self) -> list[os.DirEntry[str]]:
        if not is_folder(self.root):
            return []
        with os_errors(self.root):
            return list(os.scandir(self.root))


def seal(folder: str, source: str) -> None:
    """Notes in a finished folder what it was made from, and how its files are."""
    checkpoint = open_checkpoint(folder)
    nbytes = sum(stamp.size for stamp in checkpoint.stamps.values())
    noted = {"source": source, "nbytes": nbytes, "identity": identity_of(checkpoint)}
    with open(os.path.join(folder, _SEAL), "w", encoding="utf-8") as file:
        json.dump(noted, file)


def _entry(folder: str) -> CacheEntry | None:
    path = os.path.join(folder, _SEAL)
    try:
        noted = _noted(folder)
        return CacheEntry(folder, str(noted["source"]), int(noted["nbytes"]), os.stat(path).st_mtime)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _noted(folder: str) -> dict[str, Any]:
    """What its seal says, if anything; a ReadError if that cannot be read."""
    path = os.path.join(folder, _SEAL)
    try:
        with os_errors(path), open_file(path) as file:
            noted = json.load(file)
    except ValueError:  # there is none, too
        return {}
    return noted if isinstance(noted, dict) else {}


def _sound(folder: str) -> Checkpoint | None:
    try:
        checkpoint = open_checkpoint(folder)
        if identity_of(checkpoint) == _noted(folder).get("identity"):
            return checkpoint
        problem = "its files are not as they were written"
    except ReadError as error:
        logger.warning("the cached int8 form in %s cannot be read this time, and its source is: %s", folder, error)
        return None
    except Pyint8Error as error:
        problem = str(error)
    logger.warning("the cached int8 form in %s is removed, and made again: %s", folder, problem)
    with suppress(OSError):
        os.unlink(os.path.join(folder, _SEAL))
    return None


def _removed(folder: str) -> bool:
    """Removes a folder, unless a load uses it, or a process writes it."""
    sealed = os.path.join(folder, _SEAL)
    return remove_unlocked(folder, sealed if exists(sealed) else None)
