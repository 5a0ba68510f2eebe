"""What bitsandbytes saves of an int8 model."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyint8.errors import ModelNotSupportedError
from pyint8.quantizer.backend import bitsandbytes


def int8_modules(model: nn.Module) -> dict[str, Any]:
    """All `Linear8bitLt`, by name."""
    kind = bitsandbytes.nn.Linear8bitLt
    return {name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, kind)}


def require_codes(model: nn.Module) -> None:
    """Refuses models whose state dict would not be that of an int8 model.

    Raises:
        ModelNotSupportedError: It has no int8 module, or one whose weight was not quantized.
    """
    found = int8_modules(model)
    if not found:
        raise ModelNotSupportedError(
            f"nothing in this {type(model).__name__} is int8, so there is no int8 checkpoint to save; use its own "
            "save_pretrained, or safetensors.torch.save_model"
        )
    for name, module in found.items():
        if module.state.has_fp16_weights or (module.weight.SCB is None and module.state.SCB is None):
            raise ModelNotSupportedError(
                f"the weight of {name} is not quantized (has_fp16_weight, or it never was moved to a device): an int8 "
                "checkpoint cannot hold it. Keep the 16-bit checkpoint it was loaded from"
            )
