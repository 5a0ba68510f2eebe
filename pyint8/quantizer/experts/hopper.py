"""Whether a product of int8 experts goes by the kernel for many rows on Hopper, which is in `hopper_kernel`.

That one is in Gluon, which is experimental: it is asked for only where it was tried, and where it cannot be had, the
product is left to `kernels`, which does it everywhere.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)

_HOPPER = (9, 0)
_TRIED = ((3, 6), (3, 9))  # the first and the last minor version of Triton for which the kernel compiles as it should
_LEAST_ROWS = 120  # of an expert on average; with fewer it is no faster. See docs/performance.md, "Experts in int8".

_has_failed = False


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    gated: bool = False,
) -> torch.Tensor | None:
    """What `kernels.linear` gives for the same arguments, or None: then it is not for this kernel."""
    global _has_failed
    if _has_failed or not is_usable(x, codes, scales, len(x) if tokens is None else len(tokens), gated):
        return None
    kernel = _kernel()
    if kernel is None:
        return None
    in_order = x if tokens is None else x.index_select(0, tokens)
    try:
        y: torch.Tensor = kernel.linear(in_order, codes, scales, ends, gated=gated)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler above all; a GPU's own is raised again by the kernel that comes instead
        _has_failed = True
        _warn(error)
        return None
    return y


def is_usable(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, rows: int, gated: bool) -> bool:
    """Whether the kernel is for this product of `rows` rows, is faster, and runs on the device of `x`."""
    experts, out, inner = codes.shape
    columns, tile = (out // 2, 64) if gated else (out, 128)
    return (
        rows > _LEAST_ROWS * experts
        and codes.numel() > 0
        and (x.dtype, codes.dtype, scales.dtype) == (torch.bfloat16, torch.int8, torch.float32)
        and inner % 64 == 0
        and columns % tile == 0
        and experts * out < 2**31  # coordinates of TMA, which takes strides of up to 2**40 bytes: more than a GPU has
        and all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in (x, codes, scales))
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) == _HOPPER
    )


def is_tried() -> bool:
    """Whether Triton is one that the kernel was tried with."""
    try:
        return _TRIED[0] <= Version(import_module("triton").__version__).release[:2] <= _TRIED[1]
    except Exception:  # there is none, or one without a version of the usual form
        return False


@cache
def _kernel() -> ModuleType | None:
    """That in Gluon, if it can be had."""
    try:
        return import_module("pyint8.quantizer.experts.hopper_kernel") if is_tried() else None
    except Exception as error:  # whatever an experimental module is without
        _warn(error)
        return None


def _warn(error: Exception) -> None:
    logger.warning("Hopper's kernel for int8 experts with many rows failed; a slower one takes over: %r", error)
