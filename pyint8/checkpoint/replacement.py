"""Replaces a folder as a whole: the new one is made beside it, and takes its name once all of it is on the disk."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from pyint8.errors import OptionError
from pyint8.host.files import exists, is_folder
from pyint8.host.locks import lock, remove_unlocked, unlock
from pyint8.host.removal import discard_folder
from pyint8.host.writing import sync, write_errors

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def replaced_folder(
    folder: str, is_replaced: Callable[[str], bool], *, is_resumed: Callable[[BaseException], bool] | None = None
) -> Iterator[str]:
    """Gives an empty folder to write to; at the end it takes the place of `folder`.

    Whatever interrupts it, `folder` is as it was, or as it was going to be. What another such block left behind when
    its process was killed is removed. What cannot be removed is named in a warning, and tried again by the next block.

    Args:
        folder: There already or not; if it is, its files stay, but for those that are written anew.
        is_replaced: Of the names of files that are there, which do not stay even if they are not written anew.
        is_resumed: Of errors, after which what was written stays for the next block that has `is_resumed`, to which it
            is given; so it is after a kill.

    Raises:
        OptionError: `folder` is a file, or another process is writing what would be resumed.
        WriteError: The operating system refused.
    """
    target = os.path.realpath(folder)
    if exists(target, follow=False) and not is_folder(target):
        raise OptionError(f"{folder} is a file; give a folder to save to")
    with write_errors(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _remove_leftovers(target, but=None if is_resumed is None else _resumed(target))
        staging, locked = _staging_folder(target) if is_resumed is None else _resumed_folder(target)
        try:
            with _keeping(staging, is_resumed):
                yield staging
                if is_folder(target):
                    _keep_others(target, staging, is_replaced)
                os.chmod(staging, _mode(target))
                sync_tree(staging)
                _take_place(staging, target)
            discard_folder(staging)  # by now it is what was there before
        finally:
            unlock(locked)


@contextmanager
def _keeping(staging: str, is_resumed: Callable[[BaseException], bool] | None) -> Iterator[None]:
    """Removes what came of an attempt that failed, unless it is worth keeping."""
    try:
        yield
    except BaseException as error:
        if is_resumed is None or not is_resumed(error):
            discard_folder(staging)
        raise


def emptied_unless(folder: str, is_wanted: bool) -> None:
    """Removes what is in a folder, unless it is wanted."""
    if is_wanted:
        return
    for entry in list(os.scandir(folder)):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        else:
            os.unlink(entry.path)


def sync_tree(folder: str) -> None:
    """Returns once all files below `folder`, and their names, are on the disk.

    Raises:
        OSError: The operating system refused, be it to say which files there are.
    """
    for parent, _, files in os.walk(folder, onerror=_raise):
        for name in files:
            if not os.path.islink(os.path.join(parent, name)):
                sync(os.path.join(parent, name))
        sync(parent)


def _raise(error: OSError) -> None:
    raise error


def _prefix(target: str) -> str:
    return f".{os.path.basename(target)}.saving-"


def _staging_folder(target: str) -> tuple[str, int]:
    """A new folder beside `target`, and a lock on it, which its process holds while it lives."""
    while True:
        staging = tempfile.mkdtemp(prefix=_prefix(target), dir=os.path.dirname(target))
        try:
            locked = lock(staging)
        except BaseException:
            discard_folder(staging)
            raise
        if locked is not None:
            return staging, locked
        # Another process took it for a leftover just before it was locked.


def _resumed(target: str) -> str:
    return os.path.join(os.path.dirname(target), f"{_prefix(target)}resumed")


def _resumed_folder(target: str) -> tuple[str, int]:
    """As `_staging_folder`, but the one that an attempt left behind, if there is one."""
    staging = _resumed(target)
    while True:
        os.makedirs(staging, mode=0o700, exist_ok=True)
        try:
            locked = lock(staging, wait=False)
        except BlockingIOError:
            raise OptionError(f"another process is writing {target}; wait for it, or choose another folder") from None
        except BaseException:
            with suppress(OSError):
                os.rmdir(staging)  # unless an attempt has left something in it
            raise
        if locked is not None:
            return staging, locked
        # Another process finished with it just before it was locked.


def _remove_leftovers(target: str, but: str | None) -> None:
    pattern = os.path.join(glob.escape(os.path.dirname(target)), glob.escape(_prefix(target)) + "*")
    for leftover in set(glob.glob(pattern)) - {but}:
        remove_unlocked(leftover)


def _keep_others(target: str, staging: str, is_replaced: Callable[[str], bool]) -> None:
    """Links what is in `target` into `staging`, unless it is there in a new form."""
    for entry in os.scandir(target):
        new = os.path.join(staging, entry.name)
        if is_replaced(entry.name) or exists(new, follow=False):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.copytree(entry.path, new, symlinks=True, copy_function=_link)
        else:
            _link(entry.path, new)


def _link(source: str, new: str, *, follow_symlinks: bool = False) -> None:
    try:
        os.link(source, new, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, new, follow_symlinks=False)


def _mode(target: str) -> int:
    """Of the folder that is there, or what a new one would have (mkdtemp's is for this user alone)."""
    if is_folder(target):
        return os.stat(target).st_mode & 0o7777
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _take_place(staging: str, target: str) -> None:
    if not is_folder(target):
        os.rename(staging, target)
    elif not _exchanged(staging, target):
        _swap(staging, target)
    sync(os.path.dirname(target))


def _exchanged(one: str, other: str) -> bool:
    """Whether two folders have changed names, in one step; False where the system or the file system has no such."""
    import ctypes

    exchange = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if exchange is None:
        return False
    if exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), other)


def _swap(staging: str, target: str) -> None:
    """As `_exchanged`, in two steps: a process killed between them leaves the old folder beside, as `.old`."""
    aside = f"{staging}.old"
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(aside, target)
        raise
    discard_folder(aside)
