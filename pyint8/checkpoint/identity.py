"""What tells one checkpoint from another, so that what was made of one is not taken for the other's."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import BinaryIO

from pyint8.errors import TruncatedError
from pyint8.host.files import open_file, open_unbuffered

from ._reading import DOWNLOAD_AGAIN, os_errors
from .entry import Entry, EntryInMemory
from .index import Checkpoint

# Each may be a request to a file server, before anything else is read.
_SAMPLED = 64
_SAMPLED_BYTES = 4096

_CONFIGURATIONS = ("config.json", "generation_config.json")


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


def sample_of(entries: Sequence[Entry], tag_of: Callable[[str], str | None]) -> str:
    """A digest of a few bytes of some tensors: tells checkpoints apart whose headers are equal, wherever they lie.

    Raises:
        ReadError: A file cannot be read.
        TruncatedError: It ends too early.
    """
    import hashlib

    found = hashlib.sha256()
    chosen = random.Random(0).sample(range(len(entries)), min(_SAMPLED, len(entries)))
    with ExitStack() as stack:
        file_of = cache(lambda path: stack.enter_context(open_unbuffered(path)))
        for entry in (entries[number] for number in sorted(chosen)):
            found.update(_middle(entry, file_of) if (tag := tag_of(entry.path)) is None else tag.encode())
    return found.hexdigest()


def _middle(entry: Entry, file_of: Callable[[str], BinaryIO]) -> bytes:
    count = min(_SAMPLED_BYTES, entry.nbytes)
    start = (entry.nbytes - count) // 2
    if isinstance(entry, EntryInMemory):
        import torch

        return entry.value.reshape(-1).view(torch.uint8)[start : start + count].numpy().tobytes()
    with os_errors(entry.path):
        file = file_of(entry.path)
        file.seek(entry.offset + start)
        found = file.read(count)
    if len(found) < count:
        raise TruncatedError(f"the file ends within this tensor; {DOWNLOAD_AGAIN}", **entry.location)
    return found


def descriptions(folder: str) -> dict[str, str]:
    """Digests, by name, of the files that describe a model: its configurations and its code.

    Raises:
        ReadError: They cannot be read.
    """
    with os_errors(folder):
        names = sorted(name for name in os.listdir(folder) if name in _CONFIGURATIONS or name.endswith(".py"))
    return {name: _digest_of(os.path.join(folder, name)) for name in names}


def _digest_of(path: str) -> str:
    with os_errors(path), open_file(path) as file:
        return digest(file.read().decode(errors="replace"))


def digest(value: object) -> str:
    """Of anything that JSON has."""
    import hashlib

    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def has_digest(value: object) -> bool:
    """Whether equal digests say that values are equal: of what JSON has, and not of other objects."""
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def versions() -> list[str]:
    """Of all that decides what becomes of a checkpoint."""
    from importlib.metadata import version

    return [version(name) for name in ("pyint8", "bitsandbytes", "torch", "transformers")]
