"""The int8 lifecycle: the only importer of bitsandbytes."""

from pyint8.quantizer.devices import device_of
from pyint8.quantizer.health import BadWeight, WeightHealth, first_overflow
from pyint8.quantizer.lifecycle import Int8Quantizer
from pyint8.quantizer.modules import modules_to_keep, tied_names
from pyint8.quantizer.weights import TensorSource, WeightSource

__all__ = [
    "BadWeight",
    "Int8Quantizer",
    "TensorSource",
    "WeightHealth",
    "WeightSource",
    "device_of",
    "first_overflow",
    "modules_to_keep",
    "tied_names",
]
