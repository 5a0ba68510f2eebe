"""Planned device maps that use a GPU's memory to the last: what fits on the GPUs is not offloaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
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
_ROUNDING = 4096  # bytes: the planner adds up floats


def budgets(max_memory: Mapping[Any, Any] | None, headroom: int, load_bytes: int) -> dict[Any, int]:
    """Bytes that a plan may use on each device, all of them; GPUs first, by number.

    Args:
        max_memory: At most so much on each device, and no other devices; None for what is free on all.
        headroom: To be left free on every GPU.
        load_bytes: What the load itself takes on a GPU while it lasts; at least that is left.
    """
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    if max_memory is None:
        asked = get_max_memory()
        asked = {device: size if isinstance(device, int) else 0.9 * size for device, size in asked.items()}
    else:
        sizes = max_memory.items()
        asked = {device: convert_file_size_to_int(s) if isinstance(s, str) else s for device, s in sizes}
    found = {}
    for device in sorted(asked, key=lambda device: (not isinstance(device, int), str(device).zfill(9))):
        limit = asked[device]
        if isinstance(device, int):
            free = _free_bytes(device)
            if free is None and max_memory is None:
                free = limit  # as accelerate found it
            if free is not None:
                left = free - max(headroom, load_bytes)
                limit = left if max_memory is None else min(limit, left)
        found[device] = max(0, int(limit))
    return found


def _free_bytes(gpu: int) -> int | None:
    """With what torch's allocator holds and nobody uses; None where there is no such GPU."""
    for backend in (torch.cuda, torch.xpu):
        if backend.is_available() and gpu < backend.device_count():
            unused = backend.memory_reserved(gpu) - backend.memory_allocated(gpu)
            return int(backend.mem_get_info(gpu)[0] + unused)
    return None


def tight_memory(
    model: nn.Module,
    budgets: Mapping[Any, int],
    spread: Mapping[Any, float],
    sizes: Mapping[str, int],
    plan: Callable[[dict[Any, float]], Mapping[str, Any]],
    *,
    uncounted: int = 0,
) -> dict[Any, float]:
    """What to tell the planner, so that a model that fits on the GPUs stays there.

    Left to itself it keeps room on the first GPU for the largest layer, which nothing needs unless layers are
    offloaded, and does not come back to a GPU that was too small for one layer. So it is asked several times, and the
    most even of its plans that need nothing but the GPUs is taken.

    Args:
        model: On meta, with its quantized modules in place.
        budgets: Bytes that may be used on each device.
        spread: The planner's own, for an even spread.
        sizes: Of the model's tensors (see `tensor_bytes`).
        plan: The planner: from bytes for each device to a device map.
        uncounted: Bytes of the model that the planner does not know of.
    """
    gpus = sorted(device for device in budgets if isinstance(device, int))
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

    found: dict[Any, float] = {device: size - uncounted if device in gpus else size for device, size in budgets.items()}
    least = math.inf
    tried: list[dict[Any, float]] = []
    for share, part in product(_SHARES, _KEPT_FREE) if gpus else ():
        offered = {gpu: min(budgets[gpu], share * spread.get(gpu, 0)) + _ROUNDING for gpu in gpus}
        memory = {**budgets, **offered}
        memory[gpus[0]] += part * kept_free
        if memory in tried:
            continue
        tried.append(memory)
        if (most := fullest(memory)) < least:
            found, least = memory, most
        if least <= _EVEN * sum(sizes.values()) / len(gpus):
            break
    return found


def tensor_bytes(model: nn.Module, quantizer: Int8Quantizer, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """What each parameter and buffer will take, tied ones once: int8 weights with their scales.

    Args:
        model: On meta, with its quantized modules in place.
        quantizer: Knows what will be int8.
        dtypes: What parameters will be, unless they are quantized; those that it lacks stay as they are.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    sizes = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if quantizer.check_quantized_param(name) and not quantizer.config.has_fp16_weight:
            sizes[name] = tensor.numel() + len(tensor) * torch.float32.itemsize
        elif name not in tied:
            sizes[name] = tensor.numel() * dtypes.get(name, tensor.dtype).itemsize
    return sizes


def _largest_layer(model: nn.Module, sizes: Mapping[str, int]) -> int:
    """Bytes of the largest module that is placed as one: it has no children, or its class says so."""
    whole = getattr(model, "_no_split_modules", None) or ()
    held: Counter[str] = Counter()
    for name, size in sizes.items():
        while name:
            name = name.rpartition(".")[0]
            held[name] += size
    return max(
        held[name]
        for name, module in model.named_modules()
        if type(module).__name__ in whole or not any(True for _ in module.children())
    )
