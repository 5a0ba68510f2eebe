"""Planned device maps that use all of the GPUs' memory: a model that fits on the GPUs is not offloaded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import product
from typing import Any

from torch import nn

from pyint8.placement.device_map import device_of

# The multiples of the planner's even share that a GPU is offered, up to all that it has; and the parts of the largest
# layer, which the planner keeps free on the first GPU, that this one is offered on top.
_SHARES = (1.0, 1.25, 1.5, 2.0, 4.0, 1e9)
_KEPT_FREE = (0.0, 0.5, 1.0)
_EVEN = 1.1  # of an even share: good enough to stop searching
_ROUNDING = 4096  # bytes: the planner adds floats


def tight_memory(
    model: nn.Module,
    budgets: Mapping[Any, int],
    spread: Mapping[Any, float],
    sizes: Mapping[str, int],
    no_split: Collection[str],
    plan: Callable[[dict[Any, float]], Mapping[str, Any]],
    *,
    scale_bytes: int = 0,
) -> dict[Any, float]:
    """Per-device limits under which accelerate's planner keeps a model that fits on the GPUs there.

    Left alone it reserves memory on the first GPU for the largest layer, which is needed only if layers are offloaded,
    and does not return to a GPU that was too small for one layer. So it is asked several times, and the most even of
    the plans that use GPUs only is taken.

    Args:
        model: On meta, with its quantized modules in place.
        budgets: Bytes that may be used on each device.
        spread: The planner's own limits, for an even spread.
        sizes: Bytes of the model's tensors, tied ones once.
        no_split: Classes of modules that are placed as one.
        plan: The planner: from bytes for each device to a device map.
        scale_bytes: Of the int8 weights, which the planner does not count.
    """
    gpus = sorted(device for device in budgets if isinstance(device, int))
    kept_free = _largest_layer(model, sizes, no_split)

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

    found: dict[Any, float] = {
        device: size - scale_bytes if device in gpus else size for device, size in budgets.items()
    }
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


def _largest_layer(model: nn.Module, sizes: Mapping[str, int], no_split: Collection[str]) -> int:
    """Bytes of the largest module that is placed as one: it has no children, or is of such a class."""
    held: Counter[str] = Counter()
    for name, size in sizes.items():
        while name:
            name = name.rpartition(".")[0]
            held[name] += size
    return max(
        held[name]
        for name, module in model.named_modules()
        if type(module).__name__ in no_split or not any(True for _ in module.children())
    )
