"""Finding NaN, infinity and overflow in weights, without waiting for the device until the end."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyint8.errors import NonFiniteWeightError, first_names

logger = logging.getLogger(__name__)

_NAMED_AT_MOST = 5
_VALUES_IN_BUFFER = 1 << 18


@dataclass(frozen=True)
class BadWeight:
    """A weight that int8, or fp16 on the way to it, cannot hold."""

    name: str
    row: int  # the first such output row


# Finds the bad values of a tensor that was cast, where it is known that there may be some.
FindOverflow = Callable[[], Iterable[BadWeight]]
# The first row of each part of a larger tensor, in order, and what to call its rows; asked only if one is bad.
Parts = Callable[[], list[tuple[int, str]]]


@dataclass(frozen=True)
class _Watched:
    """Values that are finite exactly if the rows, or the tensor, that they sum up are finite."""

    name: str
    row: int  # of the first value
    start: int  # in its device's values
    count: int
    find_overflow: FindOverflow | None = None
    parts: Parts | None = None

    def bad(self, rows: list[int]) -> Iterable[BadWeight]:
        """What to tell of `rows`, counted from the first value, that are not finite."""
        return _told(self.name, [self.row + row for row in rows], self.find_overflow, self.parts)


@dataclass(frozen=True)
class _Marked:
    """Marks, uint8, that were set on the device: one for each row, or one for a whole tensor that was cast."""

    name: str
    marks: torch.Tensor
    find_overflow: FindOverflow | None = None
    parts: Parts | None = None

    @property
    def storage(self) -> int:
        """The address of what they lie in."""
        return self.marks.untyped_storage().data_ptr()

    @property
    def start(self) -> int:
        """Where they lie in their storage."""
        return int(self.marks.storage_offset())

    @property
    def end(self) -> int:
        return self.start + len(self.marks)

    def bad(self, on_host: torch.Tensor, first: int) -> Iterable[BadWeight]:
        """Looks at the marks in a copy of their storage from `first` on."""
        rows = _rows_of(on_host[self.start - first : self.end - first])
        return _told(self.name, rows, self.find_overflow, self.parts)


def _rows_of(bad: torch.Tensor) -> list[int]:
    """Where it is not 0."""
    found: list[int] = bad.nonzero().flatten().tolist()
    return found


def _told(
    name: str, rows: Sequence[int], find_overflow: FindOverflow | None, parts: Parts | None
) -> Iterator[BadWeight]:
    """What overflowed, or the first of the bad rows, which are in order, in each part of a tensor, or in all of it."""
    if not rows:
        return
    if find_overflow is not None:
        yield from find_overflow()
        return
    begun = [(0, name)] if parts is None else parts()
    begins = [begin for begin, _ in begun]
    beyond = 0
    for row in rows:
        if row >= beyond:
            part = bisect_right(begins, row) - 1
            yield BadWeight(begun[part][1], row - begins[part])
            beyond = begins[part + 1] if part + 1 < len(begins) else rows[-1] + 1


@dataclass(frozen=True)
class _Cast:
    """A tensor that was narrowed to fp16, to be checked once all of them are loaded."""

    name: str
    tensor: torch.Tensor
    find_overflow: FindOverflow


class _Values:
    """fp32 values on one device, in few buffers, so that they come to the host in few copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._full: list[torch.Tensor] = []
        self._buffer = torch.empty(0, dtype=torch.float32, device=device)  # whatever the default dtype is
        self._used = 0
        self.count = 0

    def next(self, count: int) -> torch.Tensor:
        """Space for the next `count` values."""
        if self._used + count > len(self._buffer):
            self._full.append(self._buffer[: self._used])
            self._buffer = torch.empty(max(count, _VALUES_IN_BUFFER), dtype=torch.float32, device=self._device)
            self._used = 0
        self._used += count
        self.count += count
        return self._buffer[self._used - count : self._used]

    def on_host(self) -> torch.Tensor:
        return torch.cat([part.cpu() for part in (*self._full, self._buffer[: self._used])])


class WeightHealth:
    """Collects on each device what shows which rows are bad, and reports it once at the end.

    bitsandbytes reports nothing: its GPU kernel drops NaN, and turns a row with infinity, or with a value beyond
    fp16's 65504, into zeros. The check costs one kernel for a weight, or none. Its results are evaluated on the host,
    because each kind of kernel costs a process time and memory at its first use (docs/performance.md, "First kernels
    of a process").
    """

    def __init__(self) -> None:
        self._adding = threading.Lock()  # parameters for several GPUs are made in parallel
        self._values: dict[torch.device, _Values] = {}
        self._watched: dict[torch.device, list[_Watched]] = {}
        self._casts: list[_Cast] = []
        self._scales: list[tuple[str, torch.Tensor, Parts | None]] = []
        self._marked: list[_Marked] = []

    def watch(self, name: str, row: int, half: torch.Tensor, scales: torch.Tensor) -> None:
        """Checks the rows of a band: `half` fp16 [rows, in], and the scales [rows] bitsandbytes found for them."""
        if half.is_cuda:  # elsewhere NaN shows in the scales
            _sum_rows(half, self._reserve(name, row, half.device, len(half)))
        else:
            self._reserve(name, row, scales.device, len(scales)).copy_(scales)

    def watch_scales(self, name: str, scales: torch.Tensor, parts: Parts | None = None) -> None:
        """Looks, at the end, at the scales [rows] of a pre-quantized weight: infinity is an overflow of long ago.

        Args:
            name: For errors.
            scales: fp32.
            parts: Of what the rows are, if not all of one tensor of the checkpoint (see `watch_marks`).
        """
        self._scales.append((name, scales, parts))

    def watch_marks(
        self,
        name: str,
        marks: torch.Tensor,
        find_overflow: FindOverflow | None = None,
        parts: Parts | None = None,
    ) -> None:
        """Looks, at the end, at marks, uint8, that are set where a row is bad.

        Args:
            name: For errors.
            marks: One for each row, or with `find_overflow` for a whole tensor that was cast.
            find_overflow: Searches the tensors that it was made from; called if it is marked.
            parts: The first row of each tensor of the checkpoint that rows are from, and its name, in order; called if
                a row is marked.
        """
        self._marked.append(_Marked(name, marks, find_overflow, parts))

    def watch_rows(self, name: str, weight: torch.Tensor) -> None:
        """Checks a weight [rows, in] that is quantized later, in fp16."""
        _sum_rows(weight.to(torch.float16), self._reserve(name, 0, weight.device, len(weight)))

    def watch_cast(
        self,
        name: str,
        tensor: torch.Tensor,
        stored: Iterable[torch.dtype],
        find_overflow: FindOverflow,
    ) -> None:
        """Checks an unquantized tensor at the end: infinity where none was stored is an overflow.

        Args:
            name: For errors.
            tensor: As it will be in the model.
            stored: The dtypes of the tensors it was made from.
            find_overflow: Searches the tensors it was made from (see `first_overflow`); called if it is not finite.
        """
        narrowed = any(dtype.is_floating_point and dtype != torch.float16 for dtype in stored)
        if tensor.dtype == torch.float16 and narrowed and tensor.numel():
            self._casts.append(_Cast(name, tensor.detach(), find_overflow))

    def bad_weights(self) -> list[BadWeight]:
        """The bad weights so far, each once; waits for the devices."""
        self._look_at_casts()
        self._look_at_scales()
        found: dict[str, BadWeight] = {}
        for device, group in self._watched.items():
            finite = self._values[device].on_host().isfinite()
            if bool(finite.all()):
                continue
            for watched in group:
                for bad in watched.bad(_rows_of(~finite[watched.start : watched.start + watched.count])):
                    found.setdefault(bad.name, bad)
        for bad in self._bad_marks():
            found.setdefault(bad.name, bad)
        return list(found.values())

    def _bad_marks(self) -> Iterator[BadWeight]:
        """Marks lie in few storages; what is between the first and the last that are asked for is copied at once."""
        groups: dict[int, list[_Marked]] = {}
        for marked in self._marked:
            groups.setdefault(marked.storage, []).append(marked)
        bad: dict[int, tuple[torch.Tensor, int]] = {}
        for storage, group in groups.items():
            marks = group[0].marks
            first, last = min(marked.start for marked in group), max(marked.end for marked in group)
            whole = torch.empty(0, dtype=torch.uint8, device=marks.device).set_(marks.untyped_storage())
            on_host = whole[first:last].cpu()
            if bool(on_host.any()):
                bad[storage] = on_host, first
        for marked in self._marked if bad else ():
            if marked.storage in bad:
                yield from marked.bad(*bad[marked.storage])

    def _look_at_scales(self) -> None:
        """All of a device's at once: there are hundreds, whose copies one by one would take a while at the very end."""
        groups: dict[torch.device, list[tuple[str, torch.Tensor, Parts | None]]] = {}
        for name, scales, parts in self._scales:
            groups.setdefault(scales.device, []).append((name, scales.detach(), parts))
        for device, group in groups.items():
            rooms = [self._reserve(name, 0, device, len(scales), parts=parts) for name, scales, parts in group]
            torch._foreach_copy_(rooms, [scales for _, scales, _ in group])
        self._scales.clear()

    def _look_at_casts(self) -> None:
        for cast in self._casts:
            tensor = cast.tensor
            if tensor.is_cuda:
                _sum_rows(tensor.reshape(1, -1), self._reserve(cast.name, 0, tensor.device, 1, cast.find_overflow))
            else:  # much faster there than a sum
                room = self._reserve(cast.name, 0, tensor.device, 2, cast.find_overflow)
                room[0], room[1] = tensor.aminmax()  # not stacked, which autocast may refuse
        self._casts.clear()

    def _reserve(
        self,
        name: str,
        row: int,
        device: torch.device,
        count: int,
        find_overflow: FindOverflow | None = None,
        parts: Parts | None = None,
    ) -> torch.Tensor:
        """Where to write the values of a tensor that is watched from now on."""
        with self._adding:
            if device not in self._values:
                self._values[device] = _Values(device)
            values = self._values[device]
            self._watched.setdefault(device, []).append(_Watched(name, row, values.count, count, find_overflow, parts))
            return values.next(count)

    def raise_or_warn(self, *, strict: bool, locate: Callable[[str], dict[str, Any]] | None = None) -> None:
        """Raises NonFiniteWeightError for the first bad weight, or without `strict` logs one warning for all.

        Args:
            strict: Whether to raise.
            locate: Where a parameter's tensor lies: "tensor", "path" and "offset".
        """
        bad = self.bad_weights()
        self._values.clear()
        self._watched.clear()
        self._marked.clear()
        if not bad:
            return
        named = first_names([f"{weight.name} (row {weight.row})" for weight in bad], _NAMED_AT_MOST)
        problem = "NaN, infinity, or a value that float16 cannot hold (beyond 65504)"
        if not strict:
            logger.warning("%s in %s; loaded as bitsandbytes does, with rows that are wrong", problem, named)
            return
        others = f" So have {named}." if len(bad) > 1 else ""
        raise NonFiniteWeightError(
            f"row {bad[0].row} has {problem}.{others} Mend the checkpoint, or pass strict=False to load it as "
            "bitsandbytes does, with rows that are wrong",
            **(locate(bad[0].name) if locate is not None else {"tensor": bad[0].name}),
        )


def first_overflow(name: str, stored: torch.Tensor) -> list[BadWeight]:
    """The first row of a tensor with a finite value that fp16 cannot hold, if there is one."""
    overflow = (stored.to(torch.float16).isinf() & ~stored.isinf()).nonzero()
    if not len(overflow):
        return []
    return [BadWeight(name, int(overflow[0][0]) if stored.ndim else 0)]


def _sum_rows(half: torch.Tensor, out: torch.Tensor) -> None:
    """The sum of each row in fp32, which holds any sum of finite fp16 values; infinity and NaN survive it."""
    torch.sum(half, dim=1, dtype=torch.float32, out=out)
