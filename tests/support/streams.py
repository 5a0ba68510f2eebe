"""Streams over a transport that there is already, as the loader of transformers models has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from pyint8.streaming.chunks import TensorRequest
from pyint8.streaming.head_start import EarlyTensor
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport


@contextmanager
def over(
    requests: Sequence[TensorRequest], transport: Transport, early: dict[str, EarlyTensor]
) -> Iterator[TensorStream]:
    stream = TensorStream(requests, transport, early=early)
    try:
        yield stream
    finally:
        transport.close()
        stream.close()
