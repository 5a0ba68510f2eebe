"""Errors about a byte of a file name its tensor, too."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pyint8.errors import ChecksumError, FileChangedError, ReadError, TruncatedError

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry


@contextmanager
def naming_tensors(entries: Callable[[], Iterable[Entry]]) -> Iterator[None]:
    """Names the tensor of a read that failed, if it is one of `entries`, which are asked for only then."""
    try:
        yield
    except (ChecksumError, FileChangedError, ReadError, TruncatedError) as error:
        if error.tensor is None and error.offset is not None:
            found = (each.name for each in entries() if each.path == error.path and _has(each, error.offset))
            error.tensor = next(found, None)
        raise


def _has(entry: Entry, offset: int) -> bool:
    return entry.offset <= offset < entry.offset + entry.nbytes
