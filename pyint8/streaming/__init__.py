"""Getting the bytes there: the only importer of the compiled extension."""

from pyint8.streaming.early import begin
from pyint8.streaming.head_start import HeadStart
from pyint8.streaming.lane import Lane, LaneOpener, open_lane
from pyint8.streaming.stream import Delivery, StreamSource, TensorStream

__all__ = ["Delivery", "HeadStart", "Lane", "LaneOpener", "StreamSource", "TensorStream", "begin", "open_lane"]
