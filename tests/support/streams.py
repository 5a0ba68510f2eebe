"""Checkpoints of random bytes, streams over them, and what both hold."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from pyint8 import StreamOptions
from pyint8.checkpoint import DTYPES, Checkpoint, Entry, open_checkpoint
from pyint8.streaming.early import EarlyTensor
from pyint8.streaming.head_start import FirstTensors, HeadStart
from pyint8.streaming.pour import Pour
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

CPU = torch.device("cpu")
MIB = 1 << 20
TINY = StreamOptions(threads=2, slot_bytes=8192, host_scratch=MIB)  # bands of 128 KiB in a ring of 768 KiB
Spec = tuple[str, tuple[int, ...]]


def write(path: Path, specs: dict[str, Spec]) -> Checkpoint:
    """A safetensors file of random bytes with tensors of these dtypes and shapes."""
    header, data = {}, b""
    for number, (name, (dtype, shape)) in enumerate(specs.items()):
        raw = random.Random(number).randbytes(math.prod(shape) * DTYPES[dtype][0] // 8)
        raw = bytes(byte & 1 for byte in raw) if dtype == "BOOL" else raw
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return open_checkpoint(path)


def stored(entry: Entry) -> bytes:
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def bytes_of(tensor: torch.Tensor) -> bytes:
    assert tensor.is_contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def unstamped(checkpoint: Checkpoint) -> dict[str, Entry]:
    """Entries that are read of the file in whatever state."""
    return {name: replace(entry, stamp=None) for name, entry in checkpoint.items()}


def head_start(entries: Sequence[Entry], nbytes: int = 1 << 30, *, options: StreamOptions = TINY) -> HeadStart:
    """In host memory, of as many entries as fit in `nbytes`."""
    start = HeadStart([CPU], options)
    start.begin([FirstTensors(CPU, entries, nbytes)])
    return start


def requests(checkpoint: Mapping[str, Entry], *, in_bands: bool = False) -> list[TensorRequest]:
    return [TensorRequest(entry, CPU, in_bands) for entry in checkpoint.values()]


def joined(bands: Sequence[tuple[int, torch.Tensor]]) -> bytes:
    return b"".join(bytes_of(band) for _, band in bands)


MIXED: dict[str, Spec] = {
    "small": ("F32", (3, 5)),
    "large": ("F32", (700, 300)),  # 840 000 bytes: more than the ring of TINY
    "empty": ("F16", (0, 4)),
    "flat": ("F16", (3, 0)),
    "scalar": ("F64", ()),
    "vector": ("BF16", (200_000,)),
    "wide": ("F32", (2, 250_000)),  # a row is larger than the ring
    "odd": ("U8", (1000, 333)),
    "last": ("I64", (7,)),
}


@contextmanager
def over(
    requests: Sequence[TensorRequest],
    transport: Transport,
    early: dict[str, EarlyTensor],
    begun: Pour | None = None,
    *,
    quantizer: int | None = None,
) -> Iterator[TensorStream]:
    """A stream over a transport that there is already, as the loader of transformers models has it."""
    stream = TensorStream(requests, transport, early=early, begun=begun, quantizer=quantizer)
    try:
        yield stream
    finally:
        transport.close()
        stream.close()
