"""Units that arrive together: bands of rows cut from entries, or batches of entries; pure arithmetic on headers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from pyint8.checkpoint import EntryInMemory
from pyint8.streaming.requests import TensorRequest

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.streaming.lane import Lane
    from pyint8.streaming.scratch import Region


@dataclass(eq=False, slots=True)
class Chunk:
    """What arrives together: a whole tensor, a band of its rows, or a batch of tensors."""

    request: TensorRequest
    lane: Lane
    row: int
    rows: int
    start: int  # in bytes from the start of the entry
    nbytes: int
    through_scratch: bool = False
    early: bool = False  # requested before the stream was made, so not in its budget
    memory: torch.Tensor | None = None  # uint8
    region: Region | None = None
    ticket: int | None = None  # of the first entry; the others follow
    entries: list[Entry] = field(default_factory=list)  # more than one in a batch
    landed: dict[str, torch.Tensor] = field(default_factory=dict)  # tensors of a batch, until they are taken

    def __post_init__(self) -> None:
        self.entries.append(self.request.entry)


def cut(request: TensorRequest, lane: Lane) -> list[Chunk]:
    """The entry whole, or in bands of rows that pass through the lane's scratch, in order."""
    entry = request.entry
    rows = entry.torch_shape[0] if entry.torch_shape else 1
    if isinstance(entry, EntryInMemory):
        return [Chunk(request, lane, 0, rows, 0, entry.nbytes, early=True)]
    if not request.in_bands or not entry.torch_shape or entry.nbytes == 0 or entry.stride is not None:
        return [Chunk(request, lane, 0, rows, 0, entry.nbytes)]
    row_bytes = entry.nbytes // rows
    step = _rows_in_band(entry, lane)
    return [
        Chunk(
            request,
            lane,
            row,
            min(step, rows - row),
            row * row_bytes,
            min(step, rows - row) * row_bytes,
            through_scratch=row_bytes <= lane.ring.size,
        )
        for row in range(0, rows, step)
    ]


def gather_batches(chunks_of: dict[str, list[Chunk]]) -> list[Chunk]:
    """All chunks in order; neighbours of a batch are merged into one, up to the bytes of a band."""
    gathered: list[Chunk] = []
    for name, chunks in chunks_of.items():
        if gathered and _go_together(gathered[-1], chunks[0]):
            gathered[-1].entries.append(chunks[0].request.entry)
            gathered[-1].nbytes += chunks[0].nbytes
            chunks_of[name] = gathered[-1:]
        else:
            gathered.extend(chunks)
    return gathered


def _go_together(batch: Chunk, chunk: Chunk) -> bool:
    """Whether `chunk` may be appended to `batch`."""
    first, entry = batch.request.entry, chunk.request.entry
    return (
        chunk.request.batch is not None
        and chunk.request.batch == batch.request.batch
        and chunk.lane is batch.lane
        and not (batch.early or chunk.early)
        and (entry.dtype, entry.shape) == (first.dtype, first.shape)
        and entry.stride is first.stride is None
        and 0 < batch.nbytes + chunk.nbytes <= chunk.lane.band_bytes
    )


def bands_of(chunk: Chunk, memory: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """A chunk that came through scratch is one band; an early one, which landed whole, is cut into bands here."""
    entry = chunk.request.entry
    if not entry.torch_shape:
        yield chunk.row, typed(memory, entry, ())
        return
    tensor = typed(memory, entry, (chunk.rows, *entry.torch_shape[1:]))
    step = _rows_in_band(entry, chunk.lane) if chunk.early and entry.nbytes else max(1, chunk.rows)
    for row in range(0, max(1, chunk.rows), step):
        yield chunk.row + row, tensor[row : row + step]


def _rows_in_band(entry: Entry, lane: Lane) -> int:
    return max(1, lane.band_bytes // (entry.nbytes // entry.torch_shape[0]))


def typed(memory: torch.Tensor, entry: Entry, shape: tuple[int, ...]) -> torch.Tensor:
    """`memory` as elements of the entry's dtype."""
    if entry.nbytes == 0:
        return torch.empty(shape, dtype=entry.torch_dtype, device=memory.device)
    elements = memory.view(entry.torch_dtype)
    return elements.view(shape) if entry.stride is None else entry.shaped(elements)
