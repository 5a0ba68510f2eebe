"""Device maps, as accelerate has them: modules' names to devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

DeviceMap = Mapping[str, Any]
OFF_DEVICE = ("cpu", "disk")


def device_name(device: Any) -> str:
    """A device as maps write it: "cpu", "disk", or anything else."""
    return device.type if isinstance(device, torch.device) else str(device)


def device_of(name: str, device_map: DeviceMap) -> Any:
    """The map's entry for the longest prefix of `name` that is a module in it; None without one."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def off_device(device_map: Any) -> list[str]:
    """The names of what a map has on the CPU or the disk; none where it is no map yet."""
    named = device_map.items() if isinstance(device_map, Mapping) else ()
    return [name for name, device in named if device_name(device) in OFF_DEVICE]
