"""Removing folders on a disk that may fail: what it refuses once, it may do the next time."""

from __future__ import annotations

import logging
import os
import shutil

logger = logging.getLogger(__name__)

_ATTEMPTS = 2


def remove_folder(path: str) -> bool:
    """Remove a folder and all that is in it, or as much of it as the system lets; raises none of its errors.

    Returns:
        Whether it is gone.
    """
    return any(_removed(path) for _ in range(_ATTEMPTS))


def discard_folder(path: str) -> None:
    """As `remove_folder`, of a folder that was needed for a while only; a warning names what stays."""
    if not remove_folder(path):
        logger.warning("%s is not needed any more, but could not be removed; check the disk, and delete it", path)


def _removed(path: str) -> bool:
    try:
        shutil.rmtree(path, ignore_errors=True)
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:  # rmtree lets some out, of a close or an fstat, and what was left is still there
        pass
    return False
