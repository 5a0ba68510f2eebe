"""The files of a conversion: written behind, brought to the disk, and noted in a journal."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from types import TracebackType

import torch

from pyint8.checkpoint.journal import Journal
from pyint8.checkpoint.shards import Shards
from pyint8.checkpoint.shards_writer import ShardsWriter
from pyint8.host.ending import submit
from pyint8.models.saving import MOST_BYTES, WRITERS, write_tensor
from pyint8.streaming.checksums import Checksums
from pyint8.streaming.write_behind import WriteBehind

# After so many bytes they are brought to the disk and noted there.
_NOTED_BYTES = 1 << 30


class ConvertedFiles:
    """Takes the tensors of a conversion; a context manager that joins its threads.

    Args:
        folder: Where to.
        shards: What the files hold.
        journal: Of what is there already.
        num_parameters: Of the model, for the index.
        checksums: Whether to write those of all tensors.
        others: Names of tensors in files that another process writes.
    """

    def __init__(
        self,
        folder: str,
        shards: Shards,
        journal: Journal,
        num_parameters: int,
        *,
        checksums: bool = False,
        others: frozenset[str] = frozenset(),
    ) -> None:
        self._num_parameters = num_parameters
        self._others = others
        self._checksums = Checksums(journal.checksums) if checksums else None
        with ExitStack() as stack:
            self._writer = stack.enter_context(ShardsWriter(folder, shards, journal.done | others))
            self._notes = _Notes(journal, self._writer, self._checksums)
            stack.callback(self._notes.close)
            self._behind = stack.enter_context(WriteBehind(WRITERS, MOST_BYTES))
            self._stack = stack.pop_all()

    def put(self, name: str, value: torch.Tensor) -> None:
        """Writes a tensor, unless it is another process's, later; waits while there is no room.

        Raises:
            WriteError: Of an earlier one.
        """
        if name in self._others:
            return
        write = partial(write_tensor, self._writer, self._checksums, name)
        self._notes.add(name, value.nbytes, self._behind.put(value, write))

    @property
    def waits(self) -> bool:
        """Whether there is enough to be brought to the disk."""
        return self._notes.are_due

    def note_sound(self) -> None:
        """Brings to the disk, and notes, what was taken so far."""
        self._notes.note()

    def finish(self) -> None:
        """Waits until all is written.

        Raises:
            WriteError: The operating system refused.
        """
        self._behind.finish()
        self._writer.finish()

    @property
    def checksums(self) -> dict[str, int]:
        """Those of what is written here, by name; empty if none are wanted."""
        return {} if self._checksums is None else dict(self._checksums.of)

    def write_index(self, checksums: Mapping[str, int]) -> None:
        """Writes the index, and the checksums of all tensors, if there shall be such.

        Raises:
            OSError: The operating system refused.
        """
        self._writer.write_index({"total_parameters": self._num_parameters})
        if self._checksums is not None:
            self._writer.write_checksums(checksums)

    def __enter__(self) -> ConvertedFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, traceback)


class _Notes:
    """Brings what is written to the disk, many tensors at a time, and notes them in the journal; on a thread."""

    def __init__(self, journal: Journal, writer: ShardsWriter, checksums: Checksums | None) -> None:
        self._journal, self._writer, self._checksums = journal, writer, checksums
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pyint8 journal")
        self._noting: list[Future[None]] = []
        self._names: list[str] = []
        self._writes: list[Future[None]] = []
        self._nbytes = 0

    def add(self, name: str, nbytes: int, write: Future[None]) -> None:
        self._names.append(name)
        self._writes.append(write)
        self._nbytes += nbytes

    @property
    def are_due(self) -> bool:
        return self._nbytes >= _NOTED_BYTES

    def note(self) -> None:
        """Takes it that the values added so far are good.

        Raises:
            WriteError: Of an earlier time.
        """
        for earlier in self._noting:
            if earlier.done():
                earlier.result()
        self._noting.append(submit(self._pool, self._note, self._names, self._writes))
        self._names, self._writes, self._nbytes = [], [], 0

    def _note(self, names: list[str], writes: list[Future[None]]) -> None:
        if all(write.exception() is None for write in writes):  # an error stops everything
            self._writer.sync()
            known = {} if self._checksums is None else self._checksums.of
            self._journal.add({name: known.get(name) for name in names})

    def close(self) -> None:
        """Waits for the thread."""
        self._pool.shutdown()
