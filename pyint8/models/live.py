"""What a model that is loaded has in memory: each parameter and buffer, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pyint8.errors import CheckpointError, ModelNotSupportedError, PlacementError
from pyint8.host.imports import imported
from pyint8.quantizer import codes_and_scales, is_int8, require_quantized


@dataclass(frozen=True)
class Place:
    """The memory of one parameter or buffer.

    Attributes:
        name: Its name in the model, without those of wrappers.
        values: Its tensors, which hold the same: more than one where a weight's codes lie apart from its parameter.
        scales: fp32 [out], of int8 codes [out, in]; empty for all others.
    """

    name: str
    values: tuple[torch.Tensor, ...]
    scales: tuple[torch.Tensor, ...] = ()

    @property
    def is_int8(self) -> bool:
        return bool(self.scales)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[0].shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values[0].dtype

    @property
    def device(self) -> torch.device:
        return self.values[0].device

    @property
    def address(self) -> tuple[torch.device, int]:
        """The same for parameters that share their memory."""
        return self.device, self.values[0].data_ptr()

    def put(self, value: torch.Tensor) -> None:
        """Writes a value of the same shape into the memory, ordered on the current stream of its device.

        Args:
            value: With an attribute `SCB`, fp32 [out], if this is int8.
        """
        with torch.inference_mode():  # of tensors that are autograd's leaves, or were made in it
            for memory in self.values:
                memory.copy_(value.detach())
            for memory in self.scales:
                memory.copy_(value.SCB)  # type: ignore[attr-defined]


def unwrapped(model: Any) -> Any:
    """What is inside of torch's wrappers, which put a prefix before all names."""
    from torch.nn.parallel import DataParallel, DistributedDataParallel

    while isinstance(model, DataParallel | DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def without_adapters(model: Any) -> Any:
    """The model inside of torch's wrappers and PEFT's."""
    model = unwrapped(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return unwrapped(model.get_base_model())
    return model


def live_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """All modules, by the names they would have without wrappers and adapters; shared ones once for each name.

    Raises:
        ModelNotSupportedError: An adapter is merged into a weight.
    """
    module = _without_adapter(model, name)
    yield name, module
    for leaf, child in module._modules.items():
        if child is not None:
            yield from live_modules(child, f"{name}.{leaf}" if name else leaf)


def require_int8(model: nn.Module) -> None:
    """Raises ModelNotSupportedError for a model that has no int8 module."""
    if not any(is_int8(module) for module in model.modules()):
        raise ModelNotSupportedError(
            f"nothing in this {type(model).__name__} is int8, so it is not pyint8's to reload; use load_state_dict"
        )


def places_of(modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    """What the state dict of a model names, without its adapters, and where it lies.

    Args:
        modules: The model's `live_modules`.

    Raises:
        ModelNotSupportedError: An int8 module whose weight is not quantized, an adapter that is merged, or a tensor
            that is spread over devices.
        PlacementError: accelerate keeps a tensor in a file.
        CheckpointError: A tensor has no values.
    """
    return {
        place.name: place
        for name, module in modules.items()
        for place in _places_in(f"{name}." if name else "", module)
    }


def _places_in(prefix: str, module: nn.Module) -> Iterator[Place]:
    persistent = (name for name in module._buffers if name not in module._non_persistent_buffers_set)
    own = {**module._parameters, **{name: module._buffers[name] for name in persistent}}
    for leaf, tensor in own.items():
        name = f"{prefix}{leaf}"
        if tensor is None:
            continue
        if leaf == "weight" and is_int8(module):
            require_quantized(name, module)
            codes, scales = codes_and_scales(module)
            _require_values(name, *codes, *scales)
            yield Place(name, codes, scales)
        else:
            yield Place(name, (_in_memory(name, module, leaf, tensor),))


def _in_memory(name: str, module: nn.Module, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory; accelerate's, where that keeps it in host memory between forward passes."""
    value = tensor.detach()  # not `data`: autograd notices what is written to this
    if value.is_meta:
        value = _offloaded(name, module, leaf, value)
    if type(value) is not torch.Tensor:
        raise ModelNotSupportedError(
            f"{name} is a {type(value).__name__}, which is not reloaded in place; load the model again"
        )
    _require_values(name, value)
    return value


def _require_values(name: str, *tensors: torch.Tensor) -> None:
    if any(tensor.is_meta for tensor in tensors):
        raise CheckpointError("it has no values in the model (it is on meta); load the model first", tensor=name)


def weights_maps(module: nn.Module) -> Iterator[Any]:
    """Where accelerate keeps values of a module's tensors, by their names in it, while they are on meta."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", [hook]):  # of a SequentialHook
        values = getattr(each, "weights_map", None)
        if values is not None:
            yield values


def _offloaded(name: str, module: nn.Module, leaf: str, value: torch.Tensor) -> torch.Tensor:
    values: Any
    for values in weights_maps(module):
        key = leaf
        while hasattr(values, "prefix"):
            values, key = values.dataset, values.prefix + key
        in_memory = getattr(values, "state_dict", values) or {}
        if key in in_memory:
            found: torch.Tensor = in_memory[key].detach()
            return found
        if key in getattr(values, "index", ()):
            raise PlacementError(
                f'{name} is on the "disk", where accelerate reads it in every forward pass; give the model a device '
                "map that has it in memory, or load it again"
            )
    return value


def _without_adapter(module: nn.Module, name: str) -> nn.Module:
    """What a wrapper within a model is around: a compiled module, or one that PEFT adapts."""
    while (inside := _inside(module)) is not None:
        if getattr(module, "merged_adapters", None):
            raise ModelNotSupportedError(
                f"an adapter is merged into {name}, whose weight is no checkpoint's; unmerge it first "
                "(model.unmerge_adapter())"
            )
        module = inside
    return module


def _inside(module: nn.Module) -> nn.Module | None:
    if (compiled := module._modules.get("_orig_mod")) is not None:
        return compiled
    layer: Any = getattr(imported("peft.tuners.tuners_utils"), "BaseTunerLayer", ())
    if isinstance(module, layer):
        return getattr(module, "base_layer", None)
    peft = imported("peft.utils.other")
    wrappers = [getattr(peft, name, None) for name in ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper")]
    if isinstance(module, tuple(filter(None, wrappers))):
        return module._modules.get("original_module")
    return None
