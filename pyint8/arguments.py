"""Refusing wrong arguments of `pyint8.load` early, with the right ones listed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from torch import nn

from pyint8.errors import OptionError, PlacementError
from pyint8.host.imports import imported

PLANNED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_dtype(dtype: Any) -> Any:
    """A torch.dtype, "auto" or None, from one of these or a dtype's name, or a dict of parts of a model to such.

    Raises:
        OptionError: It is anything else.
    """
    if isinstance(dtype, Mapping) and dtype:
        return {part: check_dtype(value) for part, value in dtype.items()}
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype is None or found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise OptionError(
        f'dtype is {dtype!r}; it must be a floating torch.dtype, the name of one, "auto" or None, or a dict of such '
        'for the parts of a model: {"": ..., "vision_config": ...}'
    )


def check_device_map(device_map: Any) -> None:
    """Raises PlacementError unless it is a word for a plan, a device, a dict of modules to devices, or None."""
    if device_map is None or (isinstance(device_map, str) and device_map in PLANNED_MAPS):
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
    """How many devices of a kind there are; 0 for one that torch was not built for, or that does not answer."""
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    return torch.accelerator.device_count() if torch.accelerator.is_available() and kind == _accelerator() else 0


def check_max_memory(max_memory: Any) -> None:
    """Raises OptionError unless it is a dict of devices to sizes, or None."""
    if max_memory is None:
        return
    if not isinstance(max_memory, Mapping):
        raise OptionError(f'max_memory is {max_memory!r}; it must be a dict such as {{0: "20GiB", "cpu": "64GiB"}}')
    for device, size in max_memory.items():
        _size(f"max_memory of {device!r}", size)


def check_headroom(headroom: Any, device_map: Any) -> int | None:
    """Bytes to leave free.

    Raises:
        OptionError: It is no size, or the device map is not planned.
    """
    if headroom is None:
        return None
    if not (isinstance(device_map, str) and device_map in PLANNED_MAPS):
        raise OptionError(f"headroom is for planned device maps ({', '.join(PLANNED_MAPS)}), not for {device_map!r}")
    if isinstance(headroom, float):
        raise _no_size("headroom", headroom)
    return int(_size("headroom", headroom))


def _size(name: str, value: Any) -> float:
    """Bytes."""
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


def check_model(model: Any) -> None:
    """Raises OptionError unless it is a module of one's own, a class that has from_pretrained, or None."""
    transformers = imported("transformers.modeling_utils")
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        name = type(model).__name__
        raise OptionError(
            f"model is a {name} object; give its class, model={name}: checkpoints of transformers' models may need "
            "conversions, and what is saved of them a configuration, that only loading by their class brings"
        )
    if model is None or isinstance(model, nn.Module) or (isinstance(model, type) and hasattr(model, "from_pretrained")):
        return
    raise OptionError(
        f"model is {model!r}; it must be a transformers class such as transformers.AutoModelForCausalLM, a "
        "torch.nn.Module to fill, or None"
    )
