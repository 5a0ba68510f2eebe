"""Device maps of modules that are not transformers models, through accelerate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pyint8.arguments import PLANNED_MAPS
from pyint8.errors import PlacementError
from pyint8.packing import tensor_bytes, tight_memory
from pyint8.quantizer import Int8Quantizer, device_of


def plan_device_map(
    model: nn.Module,
    device_map: Any,
    max_memory: Mapping[Any, Any] | None,
    quantizer: Int8Quantizer,
    *,
    dtypes: Mapping[str, torch.dtype],
    tightly: bool = False,
) -> dict[str, Any]:
    """A dict of modules to devices for what the user asked.

    Args:
        model: On meta, with its quantized modules in place.
        device_map: One of accelerate's words for a plan, a device, or a dict, which is checked for gaps.
        max_memory: Memory to use on each device, for a plan.
        quantizer: Knows what will be int8.
        dtypes: What parameters will be, unless they are quantized.
        tightly: `max_memory` is meant as it is (see `pyint8.packing`): leave no more free.

    Raises:
        PlacementError: A dict that leaves parameters out.
    """
    if isinstance(device_map, str) and device_map in PLANNED_MAPS:
        return _planned(model, device_map, max_memory, quantizer, dtypes, tightly)
    if isinstance(device_map, Mapping):
        _require_complete(model, device_map)
        return dict(device_map)
    return {"": torch.device(device_map)}


def _planned(
    model: nn.Module,
    plan: str,
    max_memory: Mapping[Any, Any] | None,
    quantizer: Int8Quantizer,
    dtypes: Mapping[str, torch.dtype],
    tightly: bool,
) -> dict[str, Any]:
    from accelerate.utils import get_balanced_memory, get_max_memory, infer_auto_device_map

    special = {
        name: quantizer.adjust_target_dtype(parameter.dtype)
        for name, parameter in model.named_parameters()
        if quantizer.check_quantized_param(name)
    }
    if tightly:
        special = {**dtypes, **({} if quantizer.config.has_fp16_weight else special)}
    rules = {"no_split_module_classes": getattr(model, "_no_split_modules", None), "special_dtypes": special}
    allowed = None if max_memory is None else dict(max_memory)  # accelerate writes into it
    if plan == "sequential":
        memory = get_max_memory(allowed)
    else:
        memory = get_balanced_memory(model, max_memory=allowed, low_zero=plan == "balanced_low_0", **rules)
    if tightly and max_memory is not None:
        sizes = tensor_bytes(model, quantizer, dtypes)
        scales = sum(sizes.values()) - sum(
            tensor.numel() * special.get(name, tensor.dtype).itemsize
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        )
        memory = tight_memory(
            model,
            max_memory,
            memory,
            sizes,
            lambda some: infer_auto_device_map(model, max_memory=some, **rules),
            uncounted=scales,
        )
    else:
        memory = quantizer.adjust_max_memory(memory)
    found = infer_auto_device_map(model, max_memory=memory, **rules)
    quantizer.validate_environment(device_map=found)
    return dict(found)


def _require_complete(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    lost = [name for name, _ in model.named_parameters() if device_of(name, device_map) is None]
    if lost:
        raise PlacementError(f"the device map has no entry for {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}")


def landing_device(device: Any) -> torch.device:
    """Where a tensor is loaded to: its device, or the CPU for what accelerate will offload to the disk."""
    return torch.device("cpu" if device == "disk" else device)


def dispatch(model: nn.Module, device_map: dict[str, Any], offload_folder: Any) -> None:
    """Adds accelerate's hooks where a forward pass crosses devices.

    Raises:
        PlacementError: Something goes to the disk, and there is no folder for it.
    """
    devices = {str(device) for device in device_map.values()}
    if "disk" in devices and offload_folder is None:
        raise PlacementError('the device map puts modules on "disk"; say where with offload_folder=')
    if len(devices) > 1 or "disk" in devices:
        from accelerate import dispatch_model

        dispatch_model(model, device_map=device_map, offload_dir=offload_folder)
