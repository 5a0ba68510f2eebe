"""Streams with a transport of their own, for what is read at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import torch

from pyint8.config import StreamOptions
from pyint8.report import Recorder
from pyint8.streaming.lane import LaneOpener, open_lane
from pyint8.streaming.requests import TensorRequest
from pyint8.streaming.stream import TensorStream
from pyint8.streaming.transport import Transport

if TYPE_CHECKING:
    from pyint8.checkpoint import Entry
    from pyint8.streaming.ranks.ranks import Ranks


@contextmanager
def open_stream(
    requests: Sequence[TensorRequest],
    options: StreamOptions,
    *,
    recorder: Recorder | None = None,
    opener: LaneOpener = open_lane,
    quantizer: int | None = None,
    most_bytes: int | None = None,
    ranks: Ranks | None = None,
) -> Iterator[TensorStream]:
    """A stream with a transport of its own: on leaving, the workers are joined and nothing is on its way any more.

    If the block ends without an error, no file may have been written to meanwhile.

    Args:
        requests: See `TensorStream`.
        options: How to move bytes.
        recorder: Told of bytes as they land, and of what the engine did.
        opener: Makes the lane of a device (another one for tests).
        quantizer: See `TensorStream`.
        most_bytes: See `TensorStream`.
        ranks: Those that load together.

    Raises:
        FileChangedError: A file is not the one whose header was read, or was written to since.
        ReadError: A file cannot be opened.
        DeviceError: The driver refuses.
    """
    gpus = {request.device for request in requests if request.device.type == "cuda"}
    made = Transport(options, opener, len(gpus)) if ranks is None else ranks.transport(options, opener)
    with closing(made) as transport:
        stream = TensorStream(requests, transport, recorder=recorder, quantizer=quantizer, most_bytes=most_bytes)
        try:
            yield stream
            if recorder is not None:
                recorder.set_engine(transport.stats())
            transport.require_unchanged()
        finally:
            transport.close()
            stream.close()
            if recorder is not None:
                recorder.add_spans_later(transport.spans())


def read_tensor(entry: Entry) -> torch.Tensor:
    """One entry, contiguous, in host memory of its own: for a question that is seldom asked."""
    with open_stream([TensorRequest(entry, torch.device("cpu"))], StreamOptions(threads=1)) as stream:
        return stream.whole(entry.name)


def is_same(one: Entry, other: Entry) -> bool:
    """Whether two entries are the same bytes of the same file."""
    return (one.path, one.offset, one.dtype) == (other.path, other.offset, other.dtype)


def are_alike(one: Entry, other: Entry, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether two entries have the same values, each cast to its dtype."""
    if is_same(one, other):
        return True
    values = [read_tensor(entry).to(dtype) for entry, dtype in zip((one, other), dtypes, strict=True)]
    return torch.equal(*values)
