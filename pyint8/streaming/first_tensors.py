"""Which tensors a load can begin with, before anything is known but the checkpoint and where the model shall go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pyint8.host.processes import processes
from pyint8.placement.device_map import is_planned
from pyint8.streaming.head_start import HeadStart

if TYPE_CHECKING:
    from pyint8.checkpoint import Checkpoint
    from pyint8.config import StreamOptions

# How much of the model's own memory the first tensors may take before it is there: what arrives while a model of 8
# billion parameters is built. All of it is used again for the model; the rest is for the weight being quantized.
_EARLY_PART = 0.95
# A planned map uses at least so much of a GPU's free memory (transformers' 0.9 of it, and 0.9 of that for quantizing).
_PLANNED_PART = 0.8


def start_head_start(
    checkpoint: Checkpoint, device_map: Any, max_memory: Mapping[Any, Any] | None, options: StreamOptions
) -> HeadStart | None:
    """A head start for a load of `checkpoint`; None where no GPU will be used, or it is not known which.

    Tensors are read only if all of them go to one GPU. A planned map ("auto") depends on the memory that is free:
    there, only if the GPU is the only one, and so large that the plan will be the same with what landed before.
    """
    found = first_gpu(device_map)
    if found is None:
        return None
    gpu, takes_all = found
    entries = sorted(checkpoint.values(), key=lambda entry: _natural_key(entry.name))
    least = sum(entry.numel if entry.is_floating else entry.nbytes for entry in entries)  # that the model takes
    early = int(least * _EARLY_PART)
    if takes_all:
        return HeadStart(gpu, entries, early, options, reserved=least)
    if torch.cuda.device_count() == 1 and max_memory is None and is_planned(device_map):
        most = checkpoint.most_bytes_loaded + early
        return HeadStart(gpu, entries, early, options, reserved=least, if_free=int(most / _PLANNED_PART))
    return HeadStart(gpu, (), 0, options, gpus=torch.cuda.device_count())


def first_gpu(device_map: Any) -> tuple[torch.device, bool] | None:
    """A CUDA device that tensors will land on under this map, and whether all of them will; None if none is certain."""
    if not torch.cuda.is_available():
        return None
    current = torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_initialized() else 0)
    if device_map is None:  # where torch makes tensors if that is a GPU (source: transformers, as the next rule)
        default = torch.get_default_device()
        return (default if default.type == "cuda" and default.index is not None else current), True
    if is_planned(device_map):
        return current, False
    if device_map == "cuda":
        device_map = processes().local_rank
    values = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    devices = {
        torch.device("cuda", value) if isinstance(value, int) else torch.device(value)
        for value in values
        if value != "disk"
    }
    gpus = sorted({current if gpu.index is None else gpu for gpu in devices if gpu.type == "cuda"}, key=str)
    return (gpus[0], len(set(values)) == 1) if gpus else None


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sorts "layers.9" before "layers.10", as loops over layers take them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
