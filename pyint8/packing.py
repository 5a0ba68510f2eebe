"""Planned device maps that use a GPU's memory to the last: what fits on the GPUs is not offloaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, product
from typing import Any

import torch
from torch import nn

from pyint8.quantizer import Int8Quantizer, device_of

# How much of what the planner calls an even share a GPU is offered, up to all that it has; and how much more the first
# one, for the room that the planner keeps free on it.
_SHARES = (1.0, 1.25, 1.5, 2.0, 4.0, 1e9)
_KEPT_FREE = (0.0, 0.5, 1.0)
_EVEN = 1.1  # of an even share: no need to look further


def budgets(max_memory: Mapping[Any, Any] | None, headroom: int, load_bytes: int) -> dict[Any, int]:
    """Bytes that a plan may use on each device, all of them.

    Args:
        max_memory: At most so much on each device, and no other devices; None for what is free on all.
        headroom: To be left free on every GPU.
        load_bytes: What the load itself takes on a GPU while it lasts; at least that is left.
    """
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    free = get_max_memory()
    for device in free:
        if isinstance(device, int):
            # What torch's allocator holds and nobody uses is free too.
            on_gpu = torch.cuda.is_available()
            held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if on_gpu else 0
            free[device] = max(0, free[device] + held - max(headroom, load_bytes))
        else:
            free[device] = int(free[device] * 0.9)  # as transformers plans with the host's
    if max_memory is None:
        return dict(free)
    asked = {device: convert_file_size_to_int(size) for device, size in max_memory.items()}
    return {device: min(size, free.get(device, size)) for device, size in asked.items()}


def tight_memory(
    model: nn.Module,
    budgets: Mapping[Any, int],
    spread: Mapping[Any, float],
    quantizer: Int8Quantizer,
    plan: Callable[[dict[Any, float]], Mapping[str, Any]],
) -> dict[Any, float]:
    """What to tell the planner, so that a model that fits on the GPUs stays there.

    Left to itself it keeps room on the first GPU for the largest layer, which nothing needs unless layers are
    offloaded, and does not come back to a GPU that was too small for one layer. So it is asked several times, and the
    most even of its plans that need nothing but the GPUs is taken.

    Args:
        model: On meta, with its quantized modules in place.
        budgets: Bytes that may be used on each device.
        spread: The planner's own, for an even spread.
        quantizer: Knows what will be int8.
        plan: The planner: from bytes for each device to a device map.
    """
    sizes = tensor_bytes(model, quantizer)
    gpus = [device for device in budgets if device not in ("cpu", "disk")]
    kept_free = _largest_layer(model, sizes)

    def fullest(memory: dict[Any, float]) -> float:
        """Bytes on the GPU that gets the most; infinite if the plan needs more than there is."""
        device_map = plan(dict(memory))
        used = dict.fromkeys(gpus, 0)
        for name, size in sizes.items():
            device = device_of(name, device_map)
            if device not in used:
                return math.inf
            used[device] += size
        return max(used.values()) if all(used[gpu] <= budgets[gpu] for gpu in gpus) else math.inf

    # Where not all fits, the planner decides, which does not know of scales.
    scales = sum(sizes[name] - weight.numel() for name, weight in model.named_parameters() if _is_int8(quantizer, name))
    found: dict[Any, float] = {device: size - scales if device in gpus else size for device, size in budgets.items()}
    least = math.inf
    for factor, part in product(_SHARES, _KEPT_FREE) if gpus else ():
        memory = {**budgets, **{gpu: min(budgets[gpu], factor * spread.get(gpu, 0)) for gpu in gpus}}
        memory[gpus[0]] += part * kept_free
        if (most := fullest(memory)) < least:
            found, least = memory, most
        if least <= _EVEN * sum(sizes.values()) / len(gpus):
            break
    return found


def tensor_bytes(model: nn.Module, quantizer: Int8Quantizer) -> dict[str, int]:
    """What each parameter and buffer will take, tied ones once: int8 weights with their scales."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sizes = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if name in tied:
            continue
        sizes[name] = tensor.numel() * tensor.element_size()
        if _is_int8(quantizer, name):
            sizes[name] = tensor.numel() + len(tensor) * torch.float32.itemsize
    return sizes


def _is_int8(quantizer: Int8Quantizer, name: str) -> bool:
    return quantizer.check_quantized_param(name) and not quantizer.config.has_fp16_weight


def _largest_layer(model: nn.Module, sizes: Mapping[str, int]) -> int:
    """Bytes of the largest module that is placed as one: it has no children, or its class says so."""
    whole: Iterable[str] = getattr(model, "_no_split_modules", None) or ()
    layers = [
        f"{name}."
        for name, module in model.named_modules()
        if type(module).__name__ in whole or not any(True for _ in module.children())
    ]
    return max((sum(size for name, size in sizes.items() if name.startswith(layer)) for layer in layers), default=0)
