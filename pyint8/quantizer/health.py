"""Finding NaN, infinity and overflow in weights without ever waiting for the device before the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pyint8.errors import NonFiniteWeightError

logger = logging.getLogger("pyint8")

_NAMED_AT_MOST = 5

T = TypeVar("T")


@dataclass(frozen=True)
class BadWeight:
    """A weight that int8, or fp16 on the way to it, cannot hold."""

    name: str
    row: int  # the first such output row


@dataclass(frozen=True)
class _Rows:
    """A value for each row from `first` on, finite if the row is sound."""

    name: str
    first: int
    values: torch.Tensor  # [rows]


@dataclass(frozen=True)
class _Cast:
    """A tensor that was narrowed to fp16, to be looked at once all of them are there."""

    name: str
    tensor: torch.Tensor
    find_overflow: Callable[[], BadWeight | None]


class WeightHealth:
    """Collects, on the devices, what shows which rows are bad; says so once at the end.

    bitsandbytes says nothing: its GPU kernel swallows NaN, and makes a row of zeros of one with infinity, or with a
    value beyond fp16's 65504. A weight costs one small kernel here, or none.
    """

    def __init__(self) -> None:
        self._rows: list[_Rows] = []
        self._casts: list[_Cast] = []

    def watch(self, name: str, row: int, half: torch.Tensor, scales: torch.Tensor) -> None:
        """Looks at the rows of a band: `half` fp16 [rows, in], and the scales [rows] bitsandbytes found for them."""
        # Only on a CPU does NaN show in the scales. fp32 holds any sum of fp16 values, but not of infinity or NaN.
        self._rows.append(_Rows(name, row, half.sum(dim=1, dtype=torch.float32) if half.is_cuda else scales))

    def watch_scales(self, name: str, scales: torch.Tensor) -> None:
        """Looks at the scales [rows] of a pre-quantized weight: infinity in one is an overflow of long ago."""
        self._rows.append(_Rows(name, 0, scales))

    def watch_rows(self, name: str, weight: torch.Tensor) -> None:
        """Looks at a weight [rows, in] that is quantized later, in fp16."""
        self._rows.append(_Rows(name, 0, weight.to(torch.float16).sum(dim=1, dtype=torch.float32)))

    def watch_cast(
        self,
        name: str,
        tensor: torch.Tensor,
        stored: Iterable[torch.dtype],
        find_overflow: Callable[[], BadWeight | None],
    ) -> None:
        """Looks, at the end, at an unquantized tensor: infinity where none was stored is an overflow.

        Args:
            name: For errors.
            tensor: As it will be in the model.
            stored: The dtypes of what it was made of.
            find_overflow: Looks at what it was made of (see `first_overflow`); called if the tensor is not finite.
        """
        narrowed = any(dtype.is_floating_point and dtype != torch.float16 for dtype in stored)
        if tensor.dtype == torch.float16 and narrowed and tensor.numel():
            self._casts.append(_Cast(name, tensor.detach(), find_overflow))

    def bad_weights(self) -> list[BadWeight]:
        """The bad ones so far, each once; waits for the devices."""
        found: dict[str, BadWeight] = {}
        for rows in _not_finite(self._rows, lambda rows: rows.values):
            if rows.name not in found:
                row = int((~rows.values.isfinite()).nonzero()[0])
                found[rows.name] = BadWeight(rows.name, rows.first + row)
        for cast in _not_finite(self._casts, lambda cast: _extremes(cast.tensor)):
            if (bad := cast.find_overflow()) is not None:
                found[cast.name] = bad
        return list(found.values())

    def settle(self, *, strict: bool, locate: Callable[[str], dict[str, Any]] | None = None) -> None:
        """Raises NonFiniteWeightError for the first bad weight, or with `strict` off logs one warning for all.

        Args:
            strict: Which of the two.
            locate: Where a parameter's tensor lies: "tensor", "path" and "offset".
        """
        bad = self.bad_weights()
        self._rows.clear()
        self._casts.clear()
        if not bad:
            return
        named = ", ".join(f"{weight.name} (row {weight.row})" for weight in bad[:_NAMED_AT_MOST])
        more = f" and {len(bad) - _NAMED_AT_MOST} more" if len(bad) > _NAMED_AT_MOST else ""
        problem = "NaN, infinity, or a value that float16 cannot hold (beyond 65504)"
        if not strict:
            logger.warning("%s in %s%s; loaded as bitsandbytes does, with rows that are wrong", problem, named, more)
            return
        others = f" So have {named}{more}." if len(bad) > 1 else ""
        raise NonFiniteWeightError(
            f"row {bad[0].row} has {problem}.{others} Mend the checkpoint, or pass strict=False to load it as "
            "bitsandbytes does, with rows that are wrong",
            **(locate(bad[0].name) if locate is not None else {"tensor": bad[0].name}),
        )


def first_overflow(name: str, stored: torch.Tensor) -> BadWeight | None:
    """The first row of a tensor with a finite value that fp16 cannot hold."""
    overflow = (stored.to(torch.float16).isinf() & ~stored.isinf()).nonzero()
    if not len(overflow):
        return None
    return BadWeight(name, int(overflow[0][0]) if stored.ndim else 0)


def _extremes(tensor: torch.Tensor) -> torch.Tensor:
    """A few values of a non-empty fp16 tensor, finite if it is: what is cheapest to have on its device."""
    if tensor.is_cuda:
        return tensor.sum(dtype=torch.float32).reshape(1)
    return torch.stack(tensor.aminmax())


def _not_finite(watched: list[T], values: Callable[[T], torch.Tensor]) -> Iterator[T]:
    """Those whose values are not all finite, waiting once for each device where all are."""
    by_device: dict[torch.device, list[tuple[T, torch.Tensor]]] = {}
    for item in watched:
        value = values(item)
        by_device.setdefault(value.device, []).append((item, value))
    for group in by_device.values():
        if not bool(torch.cat([value.float() for _, value in group]).isfinite().all()):
            yield from (item for item, value in group if not bool(value.isfinite().all()))
