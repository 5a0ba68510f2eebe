"""How much memory a model's tensors will take, quantized ones with their scales."""

from __future__ import annotations

from collections.abc import Container, Mapping
from itertools import chain

import torch
from torch import nn

from pyint8.quantizer.lifecycle import Int8Quantizer


def tensor_bytes(
    model: nn.Module,
    quantizer: Int8Quantizer,
    dtypes: Mapping[str, torch.dtype],
    tied: Container[str] = (),
) -> dict[str, int]:
    """The bytes of each parameter and buffer, tied ones once, int8 weights with their scales.

    Args:
        model: On meta, with its quantized modules in place.
        quantizer: Decides what will be int8.
        dtypes: The dtypes of parameters that are not quantized; others keep the dtype they have.
        tied: Parameters that share the memory of others, unless they are quantized.
    """
    sizes = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if quantizer.check_quantized_param(name) and not quantizer.config.has_fp16_weight:
            sizes[name] = tensor.numel() + len(tensor) * torch.float32.itemsize
        elif quantizer.check_experts_param(name):  # their scales are buffers
            sizes[name] = tensor.numel()
        elif name not in tied:
            sizes[name] = tensor.numel() * dtypes.get(name, tensor.dtype).itemsize
    return sizes
