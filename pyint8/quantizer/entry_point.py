"""bitsandbytes' int8 quantizer as a C function, for who calls it without Python in between."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from packaging.version import Version

from pyint8.host.packages import installed_version
from pyint8.quantizer.backend import bitsandbytes

# (fp16 [rows, columns], int8 codes [rows, columns], fp32 scales [rows], threshold, rows, columns, stream). Source:
# bitsandbytes.backends.cuda.ops, whose int8_vectorwise_quant is this call alone at threshold 0.
ENTRY_POINT = "cint8_vector_quant"
OPERATOR = "int8_vectorwise_quant"
_SIGNATURE = [ctypes.c_void_p] * 3 + [ctypes.c_float, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p]
# bitsandbytes declares its functions' arguments since 0.50. Before, from 0.46 on, they were these.
_UNDECLARED = (Version("0.46"), Version("0.50"))


def find_entry_point(library: Any = None) -> int | None:
    """The address of `cint8_vector_quant`; None where it is missing, not CUDA's, or takes other arguments.

    Args:
        library: Where to look; bitsandbytes' own library unless given.
    """
    if library is None:
        if torch.version.cuda is None:
            return None
        library = getattr(getattr(bitsandbytes, "cextension", None), "lib", None)
    function: Any = getattr(library, ENTRY_POINT, None)
    # What stands in for a function that is missing is Python's, which would say so when it is called.
    if not hasattr(function, "argtypes") or not _takes_our_arguments(function):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def _takes_our_arguments(function: Any) -> bool:
    if function.argtypes is not None:
        return list(function.argtypes) == _SIGNATURE
    version = installed_version("bitsandbytes")
    return version is not None and _UNDECLARED[0] <= version < _UNDECLARED[1]
