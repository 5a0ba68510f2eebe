"""Requests of the fake driver's GPU, and what its consumer makes of them."""

from __future__ import annotations

from pathlib import Path

import torch
from fake_driver import FakeDriver
from safetensors.torch import save_file

from pyint8 import StreamOptions
from pyint8.checkpoint import Checkpoint, Entry, open_checkpoint
from pyint8.streaming.early import EarlyTensor
from pyint8.streaming.lane import Lane
from pyint8.streaming.made import Made
from pyint8.streaming.reading import open_stream
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.transport import ReadRequest, Transport

GPU = torch.device("cuda", 0)
# Bands of 128 KiB.
OPTIONS = StreamOptions(threads=3, slot_bytes=8192, device_scratch=1 << 20)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def random_weight(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def checkpoint_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder / "model.safetensors")


def pour(driver: FakeDriver, requests: list[TensorRequest], options: StreamOptions = OPTIONS) -> dict[str, Made | None]:
    with open_stream(requests, options, opener=driver.lane, quantizer=driver.quantizer) as stream:
        made = {request.entry.name: stream.made(request.entry.name) for request in requests}
        stream.finish()
    return made


def quantized(half: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the fake's kernel does."""
    scales = half.float().abs().amax(dim=1)
    return (half.float() * (torch.full_like(scales, 127) / scales)[:, None]).round().to(torch.int8), scales


def begun_early(transport: Transport, lane: Lane, entry: Entry) -> EarlyTensor:
    storage = torch.UntypedStorage(entry.nbytes)
    ticket = transport.submit(lane, [ReadRequest(entry.path, entry.offset, entry.nbytes, storage, stamp=entry.stamp)])
    return EarlyTensor(entry, lane, storage, ticket)
