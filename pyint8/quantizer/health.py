"""Finding NaN, infinity and overflow in weights without ever waiting for the device before the end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pyint8.errors import NonFiniteWeightError

logger = logging.getLogger("pyint8")

_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class _Watched:
    name: str
    row: int
    bad: torch.Tensor  # bool, one for each row


@dataclass(frozen=True)
class BadWeight:
    """A weight that int8, or fp16 on the way to it, cannot hold."""

    name: str
    row: int  # the first such output row


class WeightHealth:
    """Collects, on the devices, which rows are bad; says so once at the end.

    bitsandbytes says nothing: its GPU kernel swallows NaN, and makes a row of zeros of one with infinity, or with a
    value beyond fp16's 65504.
    """

    def __init__(self) -> None:
        self._watched: list[_Watched] = []

    def watch(self, name: str, row: int, half: torch.Tensor, scales: torch.Tensor) -> None:
        """Looks at the rows of a band: `half` fp16 [rows, in], and the scales [rows] bitsandbytes found for them."""
        largest = scales
        if half.is_cuda and half.numel():  # elsewhere NaN shows in the scales
            largest = scales + half.amax(dim=1)
        self._watched.append(_Watched(name, row, ~largest.isfinite()))

    def watch_scales(self, name: str, scales: torch.Tensor) -> None:
        """Looks at the scales [rows] of a pre-quantized weight: infinity in one is an overflow of long ago."""
        self._watched.append(_Watched(name, 0, ~scales.isfinite()))

    def watch_rows(self, name: str, weight: torch.Tensor) -> None:
        """Looks at a weight [rows, in] that is quantized later, in fp16."""
        self._watched.append(_Watched(name, 0, ~weight.to(torch.float16).isfinite().all(dim=1)))

    def watch_cast(self, name: str, row: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Looks at rows of an unquantized tensor that were cast: infinity where there was none is an overflow."""
        narrowed = after.dtype == torch.float16 and before.is_floating_point() and before.dtype != torch.float16
        if not narrowed or not after.numel():
            return
        overflow = after.isinf()
        if after.is_cuda or bool(overflow.any()):
            overflow &= ~before.isinf()
            self._watched.append(
                _Watched(name, row, overflow.reshape(len(overflow) if overflow.ndim else 1, -1).any(1))
            )

    def bad_weights(self) -> list[BadWeight]:
        """The bad ones so far, each once; waits for the devices."""
        found: dict[str, BadWeight] = {}
        by_device: dict[torch.device, list[_Watched]] = {}
        for watched in self._watched:
            by_device.setdefault(watched.bad.device, []).append(watched)
        for group in by_device.values():
            flags = torch.stack([watched.bad.any() for watched in group]).tolist()
            for watched, flag in zip(group, flags, strict=True):
                if flag and watched.name not in found:
                    first = int(watched.bad.nonzero()[0])
                    found[watched.name] = BadWeight(watched.name, watched.row + first)
        return list(found.values())

    def settle(self, *, strict: bool, locate: Callable[[str], dict[str, Any]] | None = None) -> None:
        """Raises NonFiniteWeightError for the first bad weight, or with `strict` off logs one warning for all.

        Args:
            strict: Which of the two.
            locate: Where a parameter's tensor lies: "tensor", "path" and "offset".
        """
        bad = self.bad_weights()
        self._watched.clear()
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
