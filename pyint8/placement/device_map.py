"""Device maps: the words for a plan, devices, and dicts of modules to devices."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pyint8.errors import PlacementError, first_names
from pyint8.placement.names import listed_with_nearest, nearest_name

logger = logging.getLogger(__name__)

DeviceMap = Mapping[str, Any]
PLANNED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
OFF_DEVICE = ("cpu", "disk")


def is_planned(device_map: Any) -> bool:
    """Whether it is a word for a plan, to be made of the memory that is free."""
    return isinstance(device_map, str) and device_map in PLANNED_MAPS


def check_device_map(device_map: Any) -> None:
    """Raises PlacementError unless it is a word for a plan, a device, a dict of modules to devices, or None."""
    if device_map is None or is_planned(device_map):
        return
    if not isinstance(device_map, Mapping):
        _check_device(device_map, f"one of {', '.join(PLANNED_MAPS)}, a device, a dict of modules to devices, or None")
        return
    if not device_map:
        raise PlacementError("device_map has no entry; {'': device} puts all of a model on one device")
    for name, device in device_map.items():
        if not isinstance(name, str):
            raise PlacementError(f"device_map has the key {name!r}; keys are names of modules")
        if device != "disk":
            _check_device(device, f'a device or "disk" for {name!r}')


def _check_device(device: Any, wanted: str) -> None:
    if isinstance(device, int) and not isinstance(device, bool) and device >= 0:
        kind, index = _accelerator(), device
    else:
        try:
            parsed = torch.device(device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise PlacementError(f"device_map is {device!r}; it must be {wanted} ({error})") from None
        kind, index = parsed.type, parsed.index or 0
    if kind in ("cpu", "meta"):
        return
    count = _device_count(kind)
    if index >= count:
        there = "no such device" if count == 0 else f"{count} of the kind {kind!r}"
        raise PlacementError(
            f"device_map names {device!r}, and torch {torch.__version__} finds {there} here; name one that is there "
            '(nvidia-smi lists GPUs), or pass device_map="cpu"'
        )


def _accelerator() -> str:
    """The kind of device that a plain number means."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cuda" if accelerator is None else accelerator.type


def _device_count(kind: str) -> int:
    """How many devices of a kind there are; 0 for a kind that torch was not built for, or whose driver fails."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.accelerator.device_count() if torch.accelerator.is_available() and kind == _accelerator() else 0


def device_of(name: str, device_map: DeviceMap) -> Any:
    """The map's entry for the longest prefix of `name` that is a module in it; None without one."""
    while name not in device_map and name:
        name = name.rpartition(".")[0]
    return device_map.get(name)


def device_name(device: Any) -> str:
    """A device as maps write it: "cpu", "disk", or anything else."""
    return device.type if isinstance(device, torch.device) else str(device)


def off_device(device_map: Any) -> list[str]:
    """The names that a map puts on the CPU or the disk; none for a map that is still to be planned."""
    named = device_map.items() if isinstance(device_map, Mapping) else ()
    return [name for name, device in named if device_name(device) in OFF_DEVICE]


def landing_device(device: Any) -> torch.device:
    """Where a tensor is loaded to: its device, the current GPU if that says none, or the CPU for what accelerate will
    offload to the disk."""
    found = torch.device("cpu" if device == "disk" else device)
    return current_gpu() if str(found) == "cuda" else found


def current_gpu() -> torch.device:
    """torch's current CUDA device, which is the first one where nothing has used a GPU; makes no context there."""
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)


def check_entries(model: nn.Module, device_map: DeviceMap, *, are_all: bool) -> None:
    """Warns of entries that name nothing in a model of transformers', and of parameters without one.

    transformers puts the latter on the CPU, and refuses them once all is loaded if the map has several devices.

    Args:
        model: On meta.
        device_map: That was given for it.
        are_all: Whether all parameters need an entry; False looks for entries that name nothing alone.

    Raises:
        PlacementError: transformers would refuse it.
    """
    warn_of_dead_entries(model, device_map)
    if not are_all:
        return
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if len({*device_map.values()}) > 1 or "disk" in device_map.values():
        require_complete(names, device_map)
    lost = [name for name in names if device_of(name, device_map) is None]
    if lost:
        logger.warning("the device map has no entry for %s: transformers puts them on the CPU", first_names(lost))


def warn_of_dead_entries(model: nn.Module, device_map: DeviceMap) -> None:
    """One warning for all entries that are no module's, parameter's or buffer's name, each with the nearest that is."""
    if {*device_map} == {""}:
        return
    every = (model.named_modules, model.named_parameters, model.named_buffers)
    names = {name for named in every for name, _ in named(remove_duplicate=False)}
    nearest = {name: nearest_name(name, names - {""}) for name in device_map if name and name not in names}
    if nearest:
        logger.warning(
            "of the device map, these name nothing in this %s, so they have no effect: %s",
            type(model).__name__,
            listed_with_nearest(nearest),
        )


def require_complete(names: Iterable[str], device_map: DeviceMap) -> None:
    """Raises PlacementError for parameters that the map has no entry for."""
    lost = [name for name in names if device_of(name, device_map) is None]
    if lost:
        raise PlacementError(f"the device map has no entry for {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}")
