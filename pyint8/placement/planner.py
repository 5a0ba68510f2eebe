"""Device maps of modules that are not transformers models, through accelerate."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map
from torch import nn

from pyint8.placement.budget import MemoryBudget
from pyint8.placement.device_map import DeviceMap, is_planned, require_complete, warn_of_dead_entries
from pyint8.placement.tight import tight_memory


@dataclass(frozen=True)
class ModelSizes:
    """What a planner has to know about a model's tensors.

    Attributes:
        dtypes: Their dtypes once loaded, where these differ from those on meta.
        exact_dtypes: The same of every tensor, for an exact budget.
        nbytes: Bytes of each, scales included, tied ones once.
        no_split: Classes of modules that are placed as one.
    """

    dtypes: Mapping[str, torch.dtype]
    exact_dtypes: Mapping[str, torch.dtype]
    nbytes: Mapping[str, int]
    no_split: Collection[str] = ()


def plan_device_map(
    model: nn.Module,
    device_map: Any,
    budget: MemoryBudget,
    sizes: ModelSizes,
    keep_free: Callable[[Mapping[Any, Any]], Mapping[Any, Any]],
) -> dict[str, Any]:
    """A dict of modules to devices, for the device map that the user gave.

    Args:
        model: On meta, with its quantized modules in place.
        device_map: One of accelerate's words for a plan, a device, or a dict, which is checked for gaps.
        budget: Memory to use on each device, for a plan.
        sizes: Of the model's tensors.
        keep_free: Subtracts what the load itself needs from each device's memory, unless the budget is exact.

    Raises:
        PlacementError: A dict that leaves parameters out.
    """
    if is_planned(device_map):
        return _planned(model, device_map, budget, sizes, keep_free)
    if isinstance(device_map, Mapping):
        warn_of_dead_entries(model, device_map)
        require_complete((name for name, _ in model.named_parameters()), device_map)
        return dict(device_map)
    return {"": torch.device(device_map)}


def _planned(
    model: nn.Module,
    plan: str,
    budget: MemoryBudget,
    sizes: ModelSizes,
    keep_free: Callable[[Mapping[Any, Any]], Mapping[Any, Any]],
) -> dict[str, Any]:
    dtypes = sizes.exact_dtypes if budget.is_exact else sizes.dtypes
    rules = {"no_split_module_classes": list(sizes.no_split) or None, "special_dtypes": dict(dtypes)}
    allowed = None if budget.per_device is None else dict(budget.per_device)  # accelerate writes into it
    if plan == "sequential":
        spread = get_max_memory(allowed)
    else:
        spread = get_balanced_memory(model, max_memory=allowed, low_zero=plan == "balanced_low_0", **rules)

    def placed(memory: Mapping[Any, Any]) -> dict[str, Any]:
        return dict(infer_auto_device_map(model, max_memory=dict(memory), **rules))

    if budget.is_exact and budget.per_device is not None:
        spread = _tight(model, budget.per_device, spread, sizes, placed)
    else:
        spread = keep_free(spread)
    return placed(spread)


def _tight(
    model: nn.Module,
    per_device: Mapping[Any, int],
    spread: Mapping[Any, float],
    sizes: ModelSizes,
    placed: Callable[[Mapping[Any, Any]], DeviceMap],
) -> dict[Any, float]:
    """Limits for a plan within exactly what is allowed; accelerate counts no scales."""
    counted = sum(
        tensor.numel() * sizes.exact_dtypes.get(name, tensor.dtype).itemsize
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    )
    scale_bytes = sum(sizes.nbytes.values()) - counted
    return tight_memory(model, per_device, spread, sizes.nbytes, sizes.no_split, placed, scale_bytes=scale_bytes)
