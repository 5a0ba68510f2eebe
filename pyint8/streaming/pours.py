"""Which requests are poured, by which GPU's consumer; the others are left to the stream."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from pyint8.errors import DeviceError
from pyint8.streaming.extension import _core
from pyint8.streaming.pour import Pour
from pyint8.streaming.requests import (
    KERNEL_DTYPES,
    KERNEL_NAMES,
    TensorRequest,
    ToDtype,
    ToInt8,
    is_plain,
    kernels_cast,
)
from pyint8.streaming.scratch import shared_band_bytes

if TYPE_CHECKING:
    from pyint8.report import Recorder
    from pyint8.streaming.early import EarlyTensor
    from pyint8.streaming.lane import Lane
    from pyint8.streaming.transport import Transport

logger = logging.getLogger(__name__)

_MOST_ROWS = 2**31 - 1  # that bitsandbytes counts


def open_pours(
    requests: Sequence[TensorRequest],
    transport: Transport,
    lane_of: Callable[[torch.device], Lane],
    quantizer: int | None,
    early: dict[str, EarlyTensor],
    recorder: Recorder,
    most_bytes: int | None = None,
    begun: Pour | None = None,
) -> dict[str, Pour]:
    """Each entry's `Pour`, of its GPU; entries that none can make are left to the caller, with all parts of a tensor
    that one of them is a part of.

    Where there are no kernels for a GPU, that is all of them, with a warning.

    Args:
        requests: In the order they will be asked for; names are unique.
        transport: What moves the bytes.
        lane_of: The lane of a device.
        quantizer: The address of bitsandbytes' `cint8_vector_quant`, if there is one.
        early: What is on its way already, by name; what a pour takes over is taken out.
        recorder: Told of bytes as they land.
        most_bytes: See `Pour`.
        begun: What serves some of the requests already.
    """
    pours: dict[str, Pour] = {}
    if begun is not None:
        begun.tell(recorder)
        pours = {request.entry.name: begun for request in begun.requests}
        requests = [request for request in requests if request.entry.name not in pours]
    groups: dict[Lane, list[TensorRequest]] = {}
    others: set[Lane] = set()
    if not _core.has_kernels():
        _warn_of_missing_kernels({lane_of(request.device) for request in requests if request.becomes is not None})
        return {}
    split: set[str] = set()  # tensors of which some part cannot be poured
    lanes = {device: lane_of(device) for device in dict.fromkeys(request.device for request in requests)}
    for request in requests:
        lane = lanes[request.device]
        if _is_there(request, lane, early):
            continue
        if can_pour(request, lane, quantizer):
            groups.setdefault(lane, []).append(request)
            continue
        others.add(lane)
        if request.part is not None:
            split.add(request.part.name)
    if split:
        whole = {
            lane: [r for r in group if r.part is None or r.part.name not in split] for lane, group in groups.items()
        }
        groups = {lane: group for lane, group in whole.items() if group}
    for lane, group in groups.items():
        mine = {r.entry.name: early[r.entry.name] for r in group if _comes_early(r, lane, early)}
        scratch_bytes = lane.scratch_bytes
        if lane in others:
            scratch_bytes //= 2
            lane.leave_scratch(scratch_bytes)
        try:
            pour = _asking(Pour(transport, lane, group, quantizer or 0, scratch_bytes, mine, recorder, most_bytes))
        except DeviceError as error:
            logger.warning("weights on %s are quantized by Python operators, more slowly: %s", lane.device, str(error))
            continue
        for name in mine:
            del early[name]
        pours |= dict.fromkeys((request.entry.name for request in group), pour)
    return pours


def _asking(pour: Pour) -> Pour:
    """One that has asked for the first, so that bytes begin to move."""
    try:
        pour.ask()
    except BaseException:
        pour.close()  # breaks a reference cycle
        raise
    return pour


def can_pour(request: TensorRequest, lane: Lane, quantizer: int | None) -> bool:
    """Whether the consumer of `lane` can make what a request is for."""
    entry = request.entry
    if not lane.on_gpu or not is_plain(entry):
        return False
    if isinstance(request.becomes, ToInt8):
        most = shared_band_bytes(lane.scratch_bytes // 2)
        return quantizer is not None and _can_quantize(entry.dtype, entry.torch_shape, request.becomes, most)
    return isinstance(request.becomes, ToDtype) and kernels_cast(entry.torch_dtype, request.becomes.dtype)


@lru_cache  # of thousands of experts
def _can_quantize(stored: str, shape: tuple[int, ...], becomes: ToInt8, most_row_bytes: int) -> bool:
    dtype = KERNEL_DTYPES.get(stored)
    if dtype is None or becomes.model_dtype not in KERNEL_NAMES or len(shape) != 2:
        return False
    return max(shape) <= _MOST_ROWS and shape[1] * dtype.itemsize <= most_row_bytes


def _warn_of_missing_kernels(lanes: set[Lane]) -> None:
    gpus = sorted(str(lane.device) for lane in lanes if lane.on_gpu)
    if gpus:
        logger.warning(
            "this build of pyint8 has no GPU kernels, so weights on %s are quantized by Python operators, more slowly; "
            "build it again with PYINT8_KERNELS=ON, which says what is missing",
            ", ".join(gpus),
        )


def _comes_early(request: TensorRequest, lane: Lane, early: dict[str, EarlyTensor]) -> bool:
    tensor = early.get(request.entry.name)
    return tensor is not None and tensor.is_for(request.entry, lane)


def _is_there(request: TensorRequest, lane: Lane, early: dict[str, EarlyTensor]) -> bool:
    """Whether what is on its way is the result itself."""
    same = isinstance(request.becomes, ToDtype) and request.becomes.dtype == request.entry.torch_dtype
    return same and request.part is None and _comes_early(request, lane, early)
