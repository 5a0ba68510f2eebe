"""Unquantized tensors on their way from the stream to a parameter: cast, in bands where they are large."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pyint8.checkpoint import Entry
from pyint8.quantizer import BadWeight, WeightHealth, first_overflow
from pyint8.streaming.stream import TensorStream

# Below this a tensor is cast at once: it takes no memory worth speaking of.
_BAND_WORTHY_BYTES = 1 << 20


def cast_in_bands(entry: Entry, dtype: torch.dtype) -> bool:
    """Whether a tensor that becomes `dtype` should pass through scratch instead of landing whole."""
    return entry.torch_dtype != dtype and entry.nbytes > _BAND_WORTHY_BYTES and len(entry.torch_shape) > 0


def deliver_cast(
    stream: TensorStream, entry: Entry, name: str, dtype: torch.dtype, device: torch.device, health: WeightHealth
) -> torch.Tensor:
    """The entry as a contiguous tensor of `dtype` on `device`; `health` is shown it, as a cast may overflow."""
    if cast_in_bands(entry, dtype):
        tensor = torch.empty(entry.torch_shape, dtype=dtype, device=device)
        for row, band in stream.bands(entry.name):
            tensor[row : row + len(band)].copy_(band)
    else:
        tensor = stream.whole(entry.name).to(device=device, dtype=dtype)
    health.watch_cast(name, tensor, [entry.torch_dtype], lambda: find_overflow([entry]))
    return tensor


def find_overflow(entries: Iterable[Entry]) -> BadWeight | None:
    """The first value in any of the stored tensors that is finite, and too large for fp16."""
    found = (first_overflow(entry.name, entry.read()) for entry in entries if entry.is_floating)
    return next((bad for bad in found if bad is not None), None)
