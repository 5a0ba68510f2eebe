"""Device maps of modules that are not transformers models, through accelerate."""

from __future__ import annotations

import os
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


def dispatch(
    model: nn.Module, device_map: dict[str, Any], offload_folder: Any, left_in_files: Mapping[str, dict[str, str]]
) -> None:
    """Adds accelerate's hooks where a forward pass crosses devices.

    Args:
        model: Filled, except for what is `left_in_files`.
        device_map: Modules to devices.
        offload_folder: Where parameters that go to the disk are written, unless they are left in files.
        left_in_files: Parameters that are read where the checkpoint has them, as accelerate's index describes them.

    Raises:
        PlacementError: Something has to be written to the disk, and there is no folder for it.
    """
    devices = {str(device) for device in device_map.values()}
    if len(devices) == 1 and "disk" not in devices:
        return
    from accelerate import dispatch_model
    from accelerate.utils.offload import offload_weight

    index: dict[str, Any] = dict(left_in_files)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if device_of(name, device_map) == "disk" and name not in index:
            if offload_folder is None:
                raise PlacementError(f'the device map puts {name} on "disk"; say where with offload_folder=')
            os.makedirs(offload_folder, exist_ok=True)
            offload_weight(parameter.detach(), name, offload_folder, index)
    hooked = _without_nesting(model, device_map) if left_in_files else device_map
    dispatch_model(model, device_map=hooked, offload_dir=offload_folder, offload_index=index or None)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]


def _without_nesting(model: nn.Module, device_map: dict[str, Any]) -> dict[str, Any]:
    """The same map by entries that lie in no others: accelerate's hook of a module places all that is in it."""
    modules = dict(model.named_modules())
    flat: dict[str, Any] = {}

    def place(name: str, device: Any) -> None:
        inside = f"{name}." if name else ""
        if name in modules and any(other != name and other.startswith(inside) for other in device_map):
            module = modules[name]
            for part in (*module._parameters, *module._buffers, *module._modules):
                if inside + part not in device_map:
                    place(inside + part, device)
        else:
            flat[name] = device

    for name, device in device_map.items():
        place(name, device)
    return flat
