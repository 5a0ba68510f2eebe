"""How much memory of each device a planned device map may use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory

from pyint8.errors import OptionError
from pyint8.placement.device_map import PLANNED_MAPS, is_planned

_NAMED_DEVICES = ("cpu", "disk", "mps")
"""What accelerate's planner has beside numbers of GPUs."""


@dataclass(frozen=True)
class MemoryBudget:
    """Memory that a planned device map may use.

    Attributes:
        per_device: Bytes, or sizes such as "20GiB", by device (numbers are GPUs); None for what is free.
        is_exact: All of it may be used. Else the planner's margins are kept, as transformers keeps them.
    """

    per_device: Mapping[Any, Any] | None = None
    is_exact: bool = False


def memory_budget(max_memory: Any, headroom: Any, device_map: Any, load_bytes: int) -> MemoryBudget:
    """The budget for the arguments of `pyint8.load`.

    Args:
        max_memory: The most to use on each device, and no other devices; None for what is free on all.
        headroom: Bytes, or a size, to leave free on every GPU; None plans as transformers does.
        device_map: The map that is to be planned.
        load_bytes: Bytes of a GPU that the load itself needs; at least that much is left free.

    Raises:
        OptionError: A value is no size, or the device map is not planned.
    """
    check_max_memory(max_memory, device_map)
    headroom_bytes = check_headroom(headroom, device_map)
    if headroom_bytes is None:
        return MemoryBudget(max_memory)
    return MemoryBudget(exact_bytes(max_memory, max(headroom_bytes, load_bytes)), is_exact=True)


def allowed_bytes(budget: MemoryBudget) -> dict[Any, int]:
    """The bytes of each device that a planner starts from: those given, or what is free on all."""
    sizes = get_max_memory() if budget.per_device is None else budget.per_device
    return {device: int(size_in_bytes(f"max_memory of {device!r}", size)) for device, size in sizes.items()}


def exact_bytes(max_memory: Mapping[Any, Any] | None, headroom_bytes: int) -> dict[Any, int]:
    """Bytes of each device that a plan may use, with `headroom_bytes` kept on every GPU; GPUs first, by number."""
    found = {}
    asked = _asked_bytes(max_memory)
    for device in sorted(asked, key=lambda device: (not isinstance(device, int), str(device).zfill(9))):
        limit = asked[device]
        if isinstance(device, int):
            free: float | None = _free_bytes(device)
            if free is None and max_memory is None:
                free = limit  # accelerate's figure
            if free is not None:
                left = free - headroom_bytes
                limit = left if max_memory is None else min(limit, left)
        found[device] = max(0, int(limit))
    return found


def _asked_bytes(max_memory: Mapping[Any, Any] | None) -> dict[Any, float]:
    if max_memory is None:
        free = get_max_memory()
        return {device: size if isinstance(device, int) else 0.9 * size for device, size in free.items()}
    sizes = max_memory.items()
    return {device: convert_file_size_to_int(size) if isinstance(size, str) else size for device, size in sizes}


def _free_bytes(gpu: int) -> int | None:
    """Free bytes, unused ones of torch's allocator included; None if there is no such GPU."""
    for backend in (torch.cuda, torch.xpu):
        if backend.is_available() and gpu < backend.device_count():
            unused = backend.memory_reserved(gpu) - backend.memory_allocated(gpu)
            return int(backend.mem_get_info(gpu)[0] + unused)
    return None


def check_max_memory(max_memory: Any, device_map: Any) -> None:
    """Raises OptionError unless it is a dict of devices to sizes, for a map that is planned, or None."""
    if max_memory is None:
        return
    _require_planned("max_memory", device_map)
    if not isinstance(max_memory, Mapping):
        raise OptionError(f'max_memory is {max_memory!r}; it must be a dict such as {{0: "20GiB", "cpu": "64GiB"}}')
    for device, size in max_memory.items():
        if (not isinstance(device, int) or isinstance(device, bool)) and device not in _NAMED_DEVICES:
            raise OptionError(
                f"max_memory has the key {device!r}; keys are numbers of GPUs, and {', '.join(_NAMED_DEVICES)}"
            )
        size_in_bytes(f"max_memory of {device!r}", size)


def _require_planned(name: str, device_map: Any) -> None:
    if not is_planned(device_map):
        raise OptionError(f"{name} is for planned device maps ({', '.join(PLANNED_MAPS)}), not for {device_map!r}")


def check_headroom(headroom: Any, device_map: Any) -> int | None:
    """Bytes to leave free.

    Raises:
        OptionError: It is no size, or the device map is not planned.
    """
    if headroom is None:
        return None
    _require_planned("headroom", device_map)
    if isinstance(headroom, float):
        raise _no_size("headroom", headroom)
    return int(size_in_bytes("headroom", headroom))


def size_in_bytes(name: str, value: Any) -> float:
    """Bytes, of a number or a size such as "2GiB".

    Raises:
        OptionError: It is no size; `name` says whose.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _no_size(name, value)
    try:
        nbytes: float = convert_file_size_to_int(value) if isinstance(value, str) else value
    except ValueError:
        raise _no_size(name, value) from None
    if not nbytes >= 0:
        raise _no_size(name, value)
    return nbytes


def _no_size(name: str, value: Any) -> OptionError:
    return OptionError(f'{name} is {value!r}; it must be a number of bytes, or a size such as "2GiB"')
