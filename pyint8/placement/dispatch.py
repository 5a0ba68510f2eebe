"""Hooks of accelerate for a filled module whose parts lie on several devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pyint8.errors import PlacementError
from pyint8.placement.device_map import device_of
from pyint8.placement.offload import offload, remove


def dispatch(
    model: nn.Module,
    device_map: dict[str, Any],
    offload_folder: str | None,
    left_in_files: Mapping[str, dict[str, str]],
) -> None:
    """Adds accelerate's hooks where a forward pass crosses devices.

    Args:
        model: Filled, except for what is `left_in_files`.
        device_map: Modules to devices.
        offload_folder: Where parameters that go to the disk are written, unless they are left in files.
        left_in_files: Parameters that are read where the checkpoint has them, as accelerate's index describes them.

    Raises:
        PlacementError: Something has to be written to the disk, and there is no folder for it.
        WriteError: It cannot be written; nothing of it is left.
    """
    devices = {str(device) for device in device_map.values()}
    if len(devices) == 1 and "disk" not in devices:
        return
    from accelerate import dispatch_model

    index: dict[str, Any] = dict(left_in_files)
    try:
        _offload_rest(model, device_map, offload_folder, index)
        hooked = _without_nesting(model, device_map) if left_in_files else device_map
        dispatch_model(model, device_map=hooked, offload_dir=offload_folder, offload_index=index or None)
    except BaseException:
        if offload_folder is not None:
            remove(index.keys() - left_in_files.keys(), offload_folder)
        raise
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]


def _offload_rest(model: nn.Module, device_map: dict[str, Any], folder: str | None, index: dict[str, Any]) -> None:
    """Writes what goes to the disk and is not in `index`, and adds it there."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if device_of(name, device_map) == "disk" and name not in index:
            if folder is None:
                raise PlacementError(f'the device map puts {name} on "disk"; say where with offload_folder=')
            offload(parameter, name, folder, index)


def _without_nesting(model: nn.Module, device_map: dict[str, Any]) -> dict[str, Any]:
    """An equivalent map without nested entries: accelerate's hook of a module places everything inside it."""
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
