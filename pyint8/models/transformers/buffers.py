"""Buffers that are neither in a checkpoint nor computed again after a load.

transformers builds models on meta, and gives a buffer that is not saved (`persistent=False`) uninitialized memory; the
values that `__init__` computed are lost, and the class's `_init_weights` has to write them again.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from types import CodeType
from typing import Any

import torch
import transformers
from torch import nn

from pyint8.errors import first_names
from pyint8.placement.device_map import OFF_DEVICE

logger = logging.getLogger(__name__)

_NAMED_AT_MOST = 5


def warn_of_unfilled_buffers(model: transformers.PreTrainedModel, device_map: Mapping[str, Any] | None) -> None:
    """One warning that names the buffers of a loaded model that nothing was written to."""
    devices = {str(device) for device in (device_map or {}).values()}
    if len(devices) > 1 and not devices.isdisjoint(OFF_DEVICE):
        return  # accelerate has moved buffers between devices, so it cannot be seen what was written
    unfilled = [name for name, buffer in model.named_buffers() if _is_unfilled(model, name, buffer)]
    if unfilled:
        logger.warning(
            "%s of this %s: computed in __init__, not in the checkpoint, and lost in transformers' from_pretrained, "
            "which builds models without values; such buffers hold whatever was in memory. Write them in the class's "
            "_init_weights too, or register them with persistent=True and save the model again",
            first_names(unfilled, _NAMED_AT_MOST),
            type(model).__name__,
        )


def _is_unfilled(model: nn.Module, name: str, buffer: torch.Tensor) -> bool:
    """Whether it is as allocated: not saved, never written to in place, nor assigned by an `_init_weights`."""
    if buffer.is_meta or not buffer.numel() or buffer.is_inference() or buffer._version:
        return False
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    return leaf in owner._non_persistent_buffers_set and not _is_assigned(model, name, owner, leaf)


def _is_assigned(model: nn.Module, name: str, owner: nn.Module, leaf: str) -> bool:
    """Whether an `_init_weights` of a model around a buffer names it, or calls a method of its module that does."""
    parts = name.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    classes = {cls for module in around for cls in type(module).__mro__} - {transformers.PreTrainedModel}
    named = {word for cls in classes for word in _words(vars(cls).get("_init_weights"))}
    return leaf in named or any(leaf in _words(getattr(type(owner), word, None)) for word in named)


def _words(function: Any) -> tuple[str, ...]:
    """The names of attributes and globals in a function; none of anything else."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if isinstance(code, CodeType) else ()
