"""What tells one checkpoint from another, so that what was made of one is not taken for the other's."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from .index import Checkpoint


def identity_of(checkpoint: Checkpoint, tag_of: Callable[[str], str | None] = lambda path: None) -> str:
    """A digest of the files' names, sizes and times, and of all that their headers say.

    Args:
        checkpoint: Whose.
        tag_of: Of a file that stands for another, by its path: what is to be said of that one; None for all others.
    """
    files = [
        (os.path.basename(path), stamp.size, tag_of(path) or stamp.mtime_ns)
        for path, stamp in checkpoint.stamps.items()
    ]
    tensors = [
        (entry.name, entry.dtype, entry.shape, os.path.basename(entry.path), entry.offset, entry.nbytes)
        for entry in checkpoint.values()
    ]
    return digest([sorted(files, key=str), sorted(tensors)])


def digest(value: object) -> str:
    """Of anything that JSON has."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
