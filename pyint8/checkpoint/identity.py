"""What tells one checkpoint from another, so that what was made of one is not taken for the other's."""

from __future__ import annotations

import json
import os

from .index import Checkpoint


def identity_of(checkpoint: Checkpoint) -> str:
    """A digest of the files' names, sizes and times, and of all that their headers say."""
    files = [(os.path.basename(path), stamp.size, stamp.mtime_ns) for path, stamp in checkpoint.stamps.items()]
    tensors = [
        (entry.name, entry.dtype, entry.shape, os.path.basename(entry.path), entry.offset, entry.nbytes)
        for entry in checkpoint.values()
    ]
    return digest([sorted(files), sorted(tensors)])


def digest(value: object) -> str:
    """Of anything that JSON has."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
