"""Unquantized tensors on their way from the stream to a parameter: cast, in bands where they are large."""

from __future__ import annotations

import torch

from pyint8.checkpoint import Entry
from pyint8.quantizer import WeightHealth
from pyint8.streaming import TensorStream

# Below this a tensor is cast at once: it takes no memory worth speaking of.
_BAND_WORTHY_BYTES = 1 << 20


def cast_in_bands(entry: Entry, dtype: torch.dtype) -> bool:
    """Whether a tensor that becomes `dtype` should pass through scratch instead of landing whole."""
    return entry.torch_dtype != dtype and entry.nbytes > _BAND_WORTHY_BYTES and len(entry.torch_shape) > 0


def deliver_cast(
    stream: TensorStream, entry: Entry, name: str, dtype: torch.dtype, device: torch.device, health: WeightHealth
) -> torch.Tensor:
    """The entry as a contiguous tensor of `dtype` on `device`; `health` is shown what a cast could break."""
    if not cast_in_bands(entry, dtype):
        stored = stream.whole(entry.name).to(device)
        tensor = stored.to(dtype)
        health.watch_cast(name, 0, stored, tensor)
        return tensor
    tensor = torch.empty(entry.torch_shape, dtype=dtype, device=device)
    for row, band in stream.bands(entry.name):
        rows = tensor[row : row + len(band)]
        rows.copy_(band)
        health.watch_cast(name, row, band.to(device), rows)
    return tensor
