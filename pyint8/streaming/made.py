"""What comes of requests on a GPU, and where it is made."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.requests import ToDtype, ToInt8

if TYPE_CHECKING:
    from pyint8.streaming.requests import TensorRequest


@dataclass(frozen=True)
class Made:
    """What came of one request.

    Requests for parts of one tensor have one result, the whole, which is filled as they are served.

    Attributes:
        tensor: int8 codes [out, in], or the values in their shape; contiguous.
        scales: Of codes, fp32 [out].
        marks: uint8 [out], of a whole of more dimensions [rows], or [1] for values that were cast to fp16: not 0 where
            something does not fit (see `pyint8.quantizer.WeightHealth.watch_marks`). All of a GPU's are in one storage,
            to be copied at once.
    """

    tensor: torch.Tensor
    scales: torch.Tensor | None = None
    marks: torch.Tensor | None = None


@dataclass(frozen=True)
class Place:
    """Where a request is made, or all those that make parts of one tensor; addresses are 0 for what there is not."""

    made: Made
    columns: int
    values: int
    scales: int
    marks: int


def empty_results(request: TensorRequest, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Memory for what a request makes, or makes a part of: int8 codes and fp32 scales, or values."""
    part, becomes = request.part, request.becomes
    shape = request.entry.torch_shape if part is None else part.shape
    if isinstance(becomes, ToInt8):
        shape = tuple(reversed(shape)) if becomes.transposed and part is None else shape
        values = torch.empty(shape, dtype=torch.int8, device=device)
        return values, torch.empty(shape[:-1], dtype=torch.float32, device=device)
    assert isinstance(becomes, ToDtype)
    return torch.empty(shape, dtype=becomes.dtype, device=device), None


def memory_for(request: TensorRequest, begun: set[str], there: Container[str] = ()) -> int:
    """The bytes that memory is taken for when a request is asked for: none for a part of what is `there`, or of a whole
    in `begun`, which its own is among from now on."""
    if request.part is not None:
        if request.part.name in there or request.part.name in begun:
            return 0
        begun.add(request.part.name)
    return request.allocated_bytes


def first_parts(requests: Sequence[TensorRequest]) -> list[TensorRequest]:
    """Of those that make parts of one tensor the first, and all others."""
    wholes: dict[str, TensorRequest] = {}
    others: list[TensorRequest] = []
    for request in requests:
        if request.part is None:
            others.append(request)
        else:
            wholes.setdefault(request.part.name, request)
    return [*others, *wholes.values()]
