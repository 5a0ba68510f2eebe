"""The int8 lifecycle: the only importer of bitsandbytes."""

from pyint8.quantizer.entry_point import ENTRY_POINT, OPERATOR, find_entry_point
from pyint8.quantizer.experts.modules import has_int8_experts, why_not_experts
from pyint8.quantizer.experts.names import SCALES as EXPERT_SCALES
from pyint8.quantizer.experts.names import WEIGHTS as EXPERT_WEIGHTS
from pyint8.quantizer.health import BadWeight, WeightHealth, first_overflow
from pyint8.quantizer.lifecycle import Int8Quantizer
from pyint8.quantizer.modules import is_linear, modules_to_keep, tied_names
from pyint8.quantizer.saved import (
    codes_and_scales,
    expert_scales,
    int8_modules,
    is_int8,
    require_codes,
    require_quantized,
)
from pyint8.quantizer.sizes import tensor_bytes
from pyint8.quantizer.skip_list import entry_for
from pyint8.quantizer.weights import Experts, TensorSource, WeightSource, codes_of, experts_tensors, stand_in

__all__ = [
    "ENTRY_POINT",
    "EXPERT_SCALES",
    "EXPERT_WEIGHTS",
    "OPERATOR",
    "BadWeight",
    "Experts",
    "Int8Quantizer",
    "TensorSource",
    "WeightHealth",
    "WeightSource",
    "codes_and_scales",
    "codes_of",
    "entry_for",
    "expert_scales",
    "experts_tensors",
    "find_entry_point",
    "first_overflow",
    "has_int8_experts",
    "int8_modules",
    "is_int8",
    "is_linear",
    "modules_to_keep",
    "require_codes",
    "require_quantized",
    "stand_in",
    "tensor_bytes",
    "tied_names",
    "why_not_experts",
]
