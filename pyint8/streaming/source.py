"""An entry of a stream as the quantizer takes weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pyint8.streaming.made import Made
from pyint8.streaming.stream import TensorStream

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry


@dataclass(frozen=True)
class StreamSource:
    """One entry of a stream, as a weight to quantize (see `pyint8.quantizer.WeightSource`)."""

    stream: TensorStream
    entry: Entry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.torch_shape

    def bands(self) -> Iterator[tuple[int, torch.Tensor]]:
        return self.stream.bands(self.entry.name)

    def whole(self) -> torch.Tensor:
        return self.stream.whole(self.entry.name)

    def transposed_half(self, model_dtype: torch.dtype) -> torch.Tensor:
        return self.stream.transposed_half(self.entry.name, model_dtype)

    def made(self) -> Made | None:
        return self.stream.made(self.entry.name)

    def later(self) -> torch.Tensor:
        return self.stream.later(self.entry.name)
