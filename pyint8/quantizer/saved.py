"""What bitsandbytes has of an int8 model, before a forward pass and after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pyint8.errors import ModelNotSupportedError
from pyint8.quantizer.backend import bitsandbytes
from pyint8.quantizer.experts.modules import Int8Experts
from pyint8.quantizer.experts.names import SCALES, WEIGHTS


def int8_modules(model: nn.Module) -> dict[str, Any]:
    """All `Linear8bitLt`, by name."""
    kind = bitsandbytes.nn.Linear8bitLt
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)}


def expert_scales(model: nn.Module) -> list[str]:
    """The names of the scales of experts, buffers of its modules."""
    return [
        f"{module_name}.{name}{SCALES}"
        for module_name, module in model.named_modules()
        if isinstance(module, Int8Experts)
        for name in WEIGHTS
        if name + SCALES in module._buffers
    ]


def require_codes(model: nn.Module) -> None:
    """Refuses models whose state dict would not be that of an int8 model.

    Raises:
        ModelNotSupportedError: It has no int8 module, or one whose weight was not quantized.
    """
    found = int8_modules(model)
    if not found and not expert_scales(model):
        raise ModelNotSupportedError(
            f"nothing in this {type(model).__name__} is int8, so there is no int8 checkpoint to save; use its own "
            "save_pretrained, or safetensors.torch.save_model"
        )
    for name, module in found.items():
        if not _is_quantized(module):
            raise ModelNotSupportedError(
                f"the weight of {name} is not quantized (has_fp16_weight, or it never was moved to a device): an int8 "
                "checkpoint cannot hold it. Keep the 16-bit checkpoint it was loaded from"
            )


def is_int8(module: nn.Module) -> bool:
    """Whether it is a `Linear8bitLt`."""
    return isinstance(module, bitsandbytes.nn.Linear8bitLt)


def require_quantized(name: str, module: Any) -> None:
    """Raises ModelNotSupportedError unless the weight `name` of a `Linear8bitLt` has codes."""
    if not _is_quantized(module):
        raise ModelNotSupportedError(
            f"{name} is not quantized (has_fp16_weight, or it never was moved to a device), so it cannot be reloaded; "
            "load the model again"
        )


def codes_and_scales(module: Any) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The memory of a `Linear8bitLt`'s codes, int8 [out, in], and scales, fp32 [out]; each once.

    The first forward pass moves codes and scales from the weight to the module's state; in a copy of a model the codes
    lie apart from the parameter.
    """
    weight, state = module.weight, module.state
    return _distinct(weight, getattr(weight, "CB", None), state.CB), _distinct(_scales(weight), state.SCB)


def _distinct(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    found = {(tensor.device, tensor.data_ptr()): tensor.detach() for tensor in tensors if tensor is not None}
    return tuple(found.values())


def _scales(weight: Any) -> torch.Tensor | None:
    found: torch.Tensor | None = getattr(weight, "SCB", None)
    return found


def _is_quantized(module: Any) -> bool:
    has_scales = _scales(module.weight) is not None or module.state.SCB is not None
    return has_scales and not module.state.has_fp16_weights
