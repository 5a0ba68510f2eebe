"""Whether all of a checkpoint can be read, and its int8 weights are sound; what is wrong is listed, not raised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from pyint8.checkpoint import Checkpoint, Entry, EntryInMemory
from pyint8.config import StreamOptions
from pyint8.errors import CheckpointError, FileChangedError, Pyint8Error, QuantizationStateError, ReadError
from pyint8.models import checks
from pyint8.quantizer import EXPERT_SCALES
from pyint8.report import Recorder
from pyint8.streaming.reading import open_stream, read_tensor
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream

_CPU = torch.device("cpu")

Pieces = Callable[[int, torch.Tensor], object]
"""Takes the bytes of a tensor, in order: the number of the first, and some, uint8 [n], valid until the next."""


def misfits(checkpoint: Checkpoint) -> Iterator[Pyint8Error]:
    """What the headers show: indexes that contradict shards, codes without scales, scales of another shape."""
    for disagreement in checkpoint.disagreements:
        yield disagreement.error()
    scaled = {name.rpartition(".")[0] for name in checkpoint if name.endswith(EXPERT_SCALES)}
    for name, entry in checkpoint.items():
        error = _error_of(_require_companions, checkpoint, name, entry, scaled)
        if error is not None:
            yield error


def _error_of(require: Callable[..., None], *args: Any) -> Pyint8Error | None:
    try:
        require(*args)
    except Pyint8Error as error:
        return error
    return None


def _require_companions(checkpoint: Checkpoint, name: str, entry: Entry, scaled: Collection[str]) -> None:
    """Refuses a tensor without what belongs to it; `scaled` are modules that have the scales of all their experts."""
    module, _, leaf = name.rpartition(".")
    weight = checkpoint.entries.get(f"{module}.weight")
    if leaf in (checks.SCALES, checks.FORMAT) and weight is None:
        checks.refuse_orphan(entry, f"{module}.weight")
    if leaf == checks.SCALES and weight is not None:
        checks.require_scales(entry, weight)
        if len(weight.shape) not in (2, 3):  # of one module, or of experts
            raise QuantizationStateError(f"int8 codes of shape {list(weight.shape)}, not [out, in]", **weight.location)
    if leaf == checks.FORMAT and (entry.dtype, entry.numel) != ("U8", 1):
        raise QuantizationStateError(
            f"its dtype is {entry.dtype} and not U8, or it is no single byte", **entry.location
        )
    is_alone = leaf == "weight" and f"{module}.{checks.SCALES}" not in checkpoint
    of_all = "".join(name.rpartition(".experts.")[:2]).rstrip(".")  # as `save_pretrained` leaves them
    if entry.dtype == "I8" and is_alone and of_all not in scaled:
        checks.require_scales(None, entry)
    if name.endswith(EXPERT_SCALES) and name.removesuffix(EXPERT_SCALES) in checkpoint:
        checks.require_scales(entry, checkpoint[name.removesuffix(EXPERT_SCALES)])
    if entry.dtype == "I8" and len(entry.shape) == 3 and leaf != "weight" and name + EXPERT_SCALES not in checkpoint:
        checks.require_scales(None, entry)


class StoredBytes:
    """The bytes of a checkpoint's tensors, through a little memory; after one that cannot be read come the others.

    A context manager.

    Args:
        entries: In the order they will be read.
        options: How to move bytes.
        recorder: Told of bytes as they land.

    Attributes:
        errors: What could not be read, and why; at the end also files that changed meanwhile.
    """

    def __init__(self, entries: Sequence[Entry], options: StreamOptions, recorder: Recorder) -> None:
        self.errors: list[Pyint8Error] = []
        self._options = options
        self._recorder = recorder
        self._left = {entry.name: entry for entry in entries}
        self._stack = ExitStack()
        self._stream: TensorStream | None = None
        recorder.expect(sum(entry.nbytes for entry in entries))

    def read(self, name: str, take: Pieces) -> bool:
        """Reads one tensor; whether all of it was there."""
        entry = self._left.pop(name, None)
        taken = 0  # bytes, should it be read again
        while entry is not None:
            error, taken = self._take(entry, take, taken)
            if error is None:
                return True
            if self._is_lost(entry, error):
                return False
        return False

    def _take(self, entry: Entry, take: Pieces, taken: int) -> tuple[CheckpointError | ReadError | None, int]:
        """The error that ended it, if one did, and how many bytes were taken."""
        try:
            for start, piece in self._pieces(entry):
                if start >= taken:
                    take(start, piece)
                    taken = start + len(piece)
        except (CheckpointError, ReadError) as error:
            return error, taken
        return None, taken

    def _pieces(self, entry: Entry) -> Iterator[tuple[int, torch.Tensor]]:
        if not _is_plain(entry):
            yield 0, read_tensor(entry).reshape(-1).view(torch.uint8)
            return
        if self._stream is None:
            wanted = [entry, *self._left.values()]
            requests = [TensorRequest(_as_bytes(each), _CPU, in_bands=True) for each in wanted if _is_plain(each)]
            self._stream = self._stack.enter_context(open_stream(requests, self._options, recorder=self._recorder))
        yield from self._stream.bands(entry.name)

    def _is_lost(self, entry: Entry, error: CheckpointError | ReadError) -> bool:
        """Notes an error, which ends the stream; whether it is of this entry and not of one that was read ahead."""
        self._stack.__exit__(type(error), error, error.__traceback__)
        self._stream = None
        if error.path is None:
            raise error  # of this machine
        self.errors.append(error)
        lost = {name for name, each in self._left.items() if error.tensor in (name, None) and each.path == error.path}
        self._left = {name: each for name, each in self._left.items() if name not in lost}
        return error.tensor == entry.name or not lost or (error.tensor is None and error.path == entry.path)

    def __enter__(self) -> StoredBytes:
        return self

    def __exit__(self, *raised: Any) -> None:
        try:
            self._stack.__exit__(*raised)
        except FileChangedError as error:
            self.errors.append(error)


class Verifier:
    """Checks tensors one by one.

    Args:
        checkpoint: Whose they are.
        stored: Reads them.

    Attributes:
        problems: What is wrong with values.
    """

    def __init__(self, checkpoint: Checkpoint, stored: StoredBytes) -> None:
        self.problems: list[Pyint8Error] = []
        self._checkpoint = checkpoint
        self._stored = stored

    def check(self, name: str, expected: torch.Tensor | None = None) -> None:
        """Reads a tensor, and looks at what shows whether it is sound.

        Args:
            name: Its name.
            expected: What its bytes should be, uint8 [n] in host memory; None for any.
        """
        entry = self._checkpoint[name]
        leaf = checks.SCALES if name.endswith(EXPERT_SCALES) else name.rpartition(".")[2]
        small = bytearray() if leaf in (checks.SCALES, checks.FORMAT) else None
        difference = None if expected is None else _Difference(entry, expected)

        def take(start: int, piece: torch.Tensor) -> None:
            if small is not None:
                small.extend(piece.numpy().tobytes())
            if difference is not None:
                difference.compare(start, piece)

        if not self._stored.read(name, take):
            return
        found = [] if difference is None else [difference.problem()]
        if small and leaf == checks.SCALES and entry.dtype == "F32":
            found.append(_bad_scale(entry, torch.frombuffer(small, dtype=torch.float32)))
        if small and leaf == checks.FORMAT and len(small) == 1:
            found.append(_error_of(checks.require_row_major, small[0], entry))
        self.problems += filter(None, found)


class _Difference:
    """What bytes differ from those that are expected."""

    def __init__(self, entry: Entry, expected: torch.Tensor) -> None:
        self._entry = entry
        self._expected = expected
        self._size = max(1, entry.nbytes // max(1, entry.numel))
        self._first: int | None = None
        self._elements = 0

    def compare(self, start: int, piece: torch.Tensor) -> None:
        expected = self._expected[start : start + len(piece)]
        if torch.equal(piece, expected):
            return
        at = (piece != expected).nonzero().reshape(-1) + start
        self._first = int(at[0]) if self._first is None else self._first
        self._elements += len((at // self._size).unique())

    def problem(self) -> Pyint8Error | None:
        if self._first is None:
            return None
        location = {**self._entry.location, "offset": self._entry.offset + self._first}
        return CheckpointError(
            f"{self._elements} of its {self._entry.numel} values are not what the source gives; the first of them lies "
            "here. (Codes and scales depend on the kind of device that quantized them.)",
            **location,
        )


def _bad_scale(entry: Entry, scales: torch.Tensor) -> Pyint8Error | None:
    bad = (~(scales.isfinite() & (scales >= 0))).nonzero()
    if not len(bad):
        return None
    row = int(bad[0])
    return QuantizationStateError(
        f"{len(bad)} of its {len(scales)} scales are NaN, infinite or negative, that of row {row} first; convert the "
        "16-bit checkpoint again",
        **{**entry.location, "offset": entry.offset + 4 * row},
    )


def _is_plain(entry: Entry) -> bool:
    return entry.stride is None and not isinstance(entry, EntryInMemory)


def _as_bytes(entry: Entry) -> Entry:
    return replace(entry, dtype="U8", shape=(entry.nbytes,))
