"""The int8 lifecycle: the only importer of bitsandbytes."""

from pyint8.quantizer.entry_point import ENTRY_POINT, OPERATOR, find_entry_point
from pyint8.quantizer.health import BadWeight, WeightHealth, first_overflow
from pyint8.quantizer.lifecycle import Int8Quantizer
from pyint8.quantizer.modules import modules_to_keep, tied_names
from pyint8.quantizer.saved import int8_modules, require_codes
from pyint8.quantizer.sizes import tensor_bytes
from pyint8.quantizer.weights import TensorSource, WeightSource, stand_in

__all__ = [
    "ENTRY_POINT",
    "OPERATOR",
    "BadWeight",
    "Int8Quantizer",
    "TensorSource",
    "WeightHealth",
    "WeightSource",
    "find_entry_point",
    "first_overflow",
    "int8_modules",
    "modules_to_keep",
    "require_codes",
    "stand_in",
    "tensor_bytes",
    "tied_names",
]
