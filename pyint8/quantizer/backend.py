"""bitsandbytes, or an error that says how to get it; imported without the compiler that it may never need.

bitsandbytes decorates a few functions with `torch.compile`, which imports torch's inductor, though an int8 load never
runs them. While it is imported here, compiling them is deferred to their first call. See docs/performance.md,
"Importing bitsandbytes".
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from pyint8.errors import EnvironmentNotSupportedError
from pyint8.quantizer.requirements import require_packages

_PACKAGE = "bitsandbytes"


def _compiled_at_first_call(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """`torch.compile(function, **options)`, evaluated at the first call."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(function, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # the caller is being compiled, and this with it
            return function(*args, **kwargs)
        return compiled()(*args, **kwargs)

    return call


@contextmanager
def deferred_compile() -> Iterator[None]:
    """While it lasts, compiling bitsandbytes' functions is deferred; all other functions are compiled as usual."""
    compile_now = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        if isinstance(model, FunctionType) and model.__module__.partition(".")[0] == _PACKAGE:
            return _compiled_at_first_call(model, options)
        return compile_now(model, **options)

    torch.compile = compile_later
    try:
        yield
    finally:
        torch.compile = compile_now


require_packages()

if _PACKAGE in sys.modules:
    import bitsandbytes
else:
    with deferred_compile():
        import bitsandbytes

__all__ = ["bitsandbytes", "current_device", "deferred_compile", "require_device"]


def current_device() -> int | str:
    """The current CUDA, NPU, HPU or XPU device, or the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.current_device()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None and accelerator.type in ("npu", "hpu", "xpu"):
        return f"{accelerator.type}:{torch.accelerator.current_device_index()}"
    return "cpu"


def require_device() -> None:
    """Raises EnvironmentNotSupportedError if bitsandbytes has no backend for any device of this machine."""
    available = {"cpu"}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        available.add(accelerator.type)
    supported = set(getattr(bitsandbytes, "supported_torch_devices", {"cuda"}))
    if not available & supported:
        raise EnvironmentNotSupportedError(
            f"bitsandbytes {bitsandbytes.__version__} quantizes on {sorted(supported)}, and this machine has "
            f"{sorted(available)}; install a bitsandbytes with a backend for it"
        )
