"""Getting the bytes there: the only importer of the compiled extension."""

from pyint8.streaming.early import begin
from pyint8.streaming.head_start import EarlyTensor, HeadStart
from pyint8.streaming.lane import Lane, LaneOpener, open_lane
from pyint8.streaming.stream import Delivery, StreamSource, TensorStream
from pyint8.streaming.transport import Transport

__all__ = [
    "Delivery",
    "EarlyTensor",
    "HeadStart",
    "Lane",
    "LaneOpener",
    "StreamSource",
    "TensorStream",
    "Transport",
    "begin",
    "open_lane",
]
