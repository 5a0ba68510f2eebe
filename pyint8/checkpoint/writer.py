"""Writes a safetensors file of tensors whose sizes are known before their values: the header first, then each in place.

The layout is that of safetensors' own writer (0.8), to the byte: widest dtypes first, then by name.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType

from pyint8.errors import CheckpointError
from pyint8.host.writing import create, write_errors

from .entry import DTYPES

_LENGTH_BYTES = 8
_DTYPE_ORDER = {name: place for place, name in enumerate(DTYPES)}

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor that is going to be written.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The format's name of its dtype, a key of `DTYPES`.
        shape: In elements.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8


class SafetensorsWriter:
    """One file under way; a context manager that closes it. Threads may write different tensors at once.

    Args:
        path: A new file, or one that such a writer of the same tensors has left unfinished, with `resume`.
        tensors: All that it will hold.
        metadata: Its `__metadata__`.
        resume: Keep what is in the file.

    Raises:
        WriteError: The operating system refused.
    """

    def __init__(
        self, path: str, tensors: Iterable[TensorPlan], metadata: Mapping[str, str], *, resume: bool = False
    ) -> None:
        self._path = path
        header, self._places = _layout(tensors, metadata)
        self._closing = threading.Lock()
        with write_errors(path):
            self._file = create(path, keep=resume)
        try:
            self._write_at(0, header, None)
        except BaseException:
            self.close()
            raise

    def write(self, name: str, pieces: Iterable[Buffer]) -> None:
        """Writes a tensor's bytes: little-endian, contiguous, row-major, in pieces that follow each other.

        Raises:
            CheckpointError: They are not as many as the tensor has.
            WriteError: The operating system refused.
        """
        start, end = self._places[name]
        at = start
        for piece in pieces:
            view = memoryview(piece)
            if at + view.nbytes > end:
                raise self._wrong_size(name, f"more than the {end - start} bytes")
            self._write_at(at, view, name)
            at += view.nbytes
        if at != end:
            raise self._wrong_size(name, f"{at - start} bytes instead of the {end - start}")

    def sync(self) -> None:
        """Returns once everything written so far is on the disk; a file that is closed is left alone.

        Raises:
            WriteError: The operating system refused.
        """
        with self._closing, write_errors(self._path):
            if self._file >= 0:
                os.fdatasync(self._file)

    def close(self) -> None:
        """Closes the file. Idempotent.

        Raises:
            WriteError: The operating system refused what was written before.
        """
        with self._closing, write_errors(self._path):
            file, self._file = self._file, -1  # whatever a close answers, the descriptor may be another's by now
            if file >= 0:
                os.close(file)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_at(self, offset: int, data: Buffer, name: str | None) -> None:
        view = memoryview(data).cast("B")
        with write_errors(self._path, name):
            while view.nbytes:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written

    def _wrong_size(self, name: str, found: str) -> CheckpointError:
        return CheckpointError(f"{found} that were planned were given for it", path=self._path, tensor=name)


def file_bytes(tensors: Iterable[TensorPlan], metadata: Mapping[str, str]) -> int:
    """The size of the file that will hold these tensors, header included."""
    header, places = _layout(tensors, metadata)
    return max((end for _, end in places.values()), default=len(header))


def _layout(tensors: Iterable[TensorPlan], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The header with its length, and by name where each tensor begins and ends in the file."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends: dict[str, tuple[int, int]] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: (-_DTYPE_ORDER[tensor.dtype], tensor.name)):
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        ends[tensor.name] = (begin, end)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    start = _LENGTH_BYTES + len(text)
    places = {name: (start + begin, start + end) for name, (begin, end) in ends.items()}
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, places
