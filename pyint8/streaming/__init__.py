"""Getting the bytes there: the only importer of the compiled extension."""

from pyint8.streaming.lane import Lane, LaneOpener, open_lane
from pyint8.streaming.stream import Delivery, StreamSource, TensorStream

__all__ = ["Delivery", "Lane", "LaneOpener", "StreamSource", "TensorStream", "open_lane"]
