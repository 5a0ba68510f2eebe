"""Writes the files of a checkpoint, each open only while tensors of it are written."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from types import TracebackType

from pyint8.errors import CheckpointError

from .checksums import CHECKSUMS, checksums_text
from .shards import INDEX, Shards
from .writer import Buffer, SafetensorsWriter, file_bytes

_METADATA = {"format": "pt"}


def file_sizes(shards: Shards) -> dict[str, int]:
    """The bytes of each safetensors file that `ShardsWriter` writes, by its name."""
    return {file: file_bytes(plans, _METADATA) for file, plans in shards.files.items()}


class ShardsWriter:
    """All safetensors files of a checkpoint; a context manager that closes them. Threads may write at once.

    Args:
        folder: Where to.
        shards: What the files hold.
        done: Tensors that the files in `folder` have already.
    """

    def __init__(self, folder: str, shards: Shards, done: Collection[str] = ()) -> None:
        self._folder = folder
        self._shards = shards
        self._left = {file: {plan.name for plan in plans}.difference(done) for file, plans in shards.files.items()}
        self._begun = {shards.file_of[name] for name in done}
        self._open: dict[str, SafetensorsWriter] = {}
        self._lock = threading.Lock()

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Writes a tensor's bytes: little-endian, contiguous, row-major, in pieces that follow each other.

        Raises:
            CheckpointError: They are not as many as the tensor has.
            WriteError: The operating system refused.
        """
        file = self._shards.file_of[name]
        self._writer(file).write(name, pieces)
        with self._lock:
            self._left[file].discard(name)
            finished = None if self._left[file] else self._open.pop(file)
        if finished is not None:
            with finished:
                finished.sync()

    def sync(self) -> None:
        """Returns once everything written so far is on the disk.

        Raises:
            WriteError: The operating system refused.
        """
        with self._lock:
            writers = list(self._open.values())
        for writer in writers:  # one that is closed meanwhile was synced before
            writer.sync()

    def finish(self) -> None:
        """Sees that every tensor was written.

        Raises:
            CheckpointError: One was not.
        """
        for file, left in self._left.items():
            if left:
                path = os.path.join(self._folder, file)
                raise CheckpointError("the tensor was not written", path=path, tensor=min(left))

    def write_index(self, metadata: Mapping[str, object]) -> None:
        """Writes the index, unless there is only one file."""
        index = self._shards.index(metadata)
        if index is not None:
            with open(os.path.join(self._folder, INDEX), "wb") as file:
                file.write(index)

    def write_checksums(self, checksums: Mapping[str, int]) -> None:
        """Writes the file of checksums: the CRC-32C of each tensor."""
        with open(os.path.join(self._folder, CHECKSUMS), "wb") as file:
            file.write(checksums_text(self._shards.file_of, checksums))

    def __enter__(self) -> ShardsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for writer in self._open.values():
                stack.callback(writer.close)

    def _writer(self, file: str) -> SafetensorsWriter:
        with self._lock:
            if file not in self._open:
                path, plans = os.path.join(self._folder, file), self._shards.files[file]
                self._open[file] = SafetensorsWriter(path, plans, _METADATA, resume=file in self._begun)
            return self._open[file]
