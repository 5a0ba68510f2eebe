"""Hugging Face checkpoints to bitsandbytes int8 models, at the speed of the bus.

    import pyint8
    model = pyint8.load("path/to/checkpoint", device_map="auto")

Importing pyint8 imports neither torch nor transformers nor bitsandbytes; loading does.
"""

from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import Pyint8Error
from pyint8.loader import load
from pyint8.report import LoadReport

__all__ = ["Int8Config", "LoadReport", "Pyint8Error", "StreamOptions", "load"]
__version__ = "0.1.0"
