"""PEFT's `target_parameters` on int8 experts: low-rank updates of activations, since codes cannot be added to.

PEFT wraps a module for each of its parameters that is named, in a `ParamWrapper` whose forward pass adds the update to
the parameter for as long as it lasts. One that gets int8 experts becomes of the class that is made here of its own, as
it takes the module. Adapters are PEFT's: of the same names and shapes, for models in 16 bit too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from pyint8.errors import ModelNotSupportedError, NonFiniteWeightError
from pyint8.quantizer.backend import bitsandbytes
from pyint8.quantizer.experts.modules import Int8Experts
from pyint8.quantizer.experts.names import SCALES, WEIGHTS

# PEFT compares this name, not the class.
_WRAPPER = "ParamWrapper"
_STEPS = 127.0  # of a code, from 0 to a row's largest value


class Update(NamedTuple):
    """A low-rank update of the weights of all experts, as PEFT has it.

    Attributes:
        first: [experts * rank, in], expert by expert.
        second: [out, rank * experts], rank by rank.
        scaling: Of their product.
    """

    first: torch.Tensor
    second: torch.Tensor
    scaling: float

    def of(self, x: torch.Tensor, ids: torch.Tensor, experts: int) -> torch.Tensor:
        """What it adds to the result of a linear layer, [rows, out], of the dtype of the update.

        All experts are multiplied by at once, and all but a row's own are left out between the two: neither the device
        is waited for, nor a weight of an expert copied.

        Args:
            x: [rows, in].
            ids: The expert of each row, [rows].
            experts: How many there are.
        """
        inner = (x.to(self.first.dtype) @ self.first.T).view(len(x), experts, -1)
        is_own = torch.arange(experts, device=ids.device) == ids.unsqueeze(-1)
        own = inner.masked_fill(~is_own.unsqueeze(-1), 0.0).transpose(1, 2).flatten(1)
        return (own @ self.second.T) * self.scaling


def adapt_wrapper(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Makes a wrapper of PEFT that gets int8 experts one that knows them; torch calls it with every new submodule.

    Raises:
        ModelNotSupportedError: An adapter for experts that take every token for every expert, or not for a weight.
    """
    if name != "base_layer" or type(parent).__name__ != _WRAPPER or isinstance(parent, _Int8Wrapper):
        return
    experts = child.get_base_layer() if isinstance(child, _Int8Wrapper) else child
    if not isinstance(experts, Int8Experts):
        return
    if experts.kind.is_sorted:
        raise ModelNotSupportedError(
            f"PEFT's target_parameters cannot name the int8 experts of {type(experts).__name__}: load the model with "
            "Int8Config(experts=False), or name other modules (target_modules)"
        )
    parameter = getattr(parent, "parameter_name", None)
    if parameter not in WEIGHTS:
        raise ModelNotSupportedError(
            f"PEFT's target_parameters can name the weights of {type(experts).__name__}, whose experts are int8, and "
            f"not {parameter}: leave it out, or load the model with Int8Config(experts=False)"
        )
    original: type = type(parent)
    parent.__class__ = _wrapper_of(original)


@cache
def register() -> None:
    """Has torch call `adapt_wrapper`; once in a process."""
    register_module_module_registration_hook(adapt_wrapper)


class _Int8Wrapper:
    """What replaces methods of PEFT's `ParamWrapper`; mixed into it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By PEFT's class, since the one made of it has no name in any module."""
        return _blank, (type(self).__mro__[2],), self.__dict__

    @contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        updates = [
            Update(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name])
            for name in active_adapters
            if name in self.lora_A
        ]
        if not updates:  # so the fast road stays open
            yield
            return
        with self.get_base_layer().updated(self.parameter_name, updates):
            yield

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the weights, which are quantized again.

        Args:
            safe_merge: Refuse an adapter with NaN or infinity.
            adapter_names: Of which; None for the active ones.

        Raises:
            NonFiniteWeightError: `safe_merge`, and there are such values; nothing is changed.
        """
        for name in adapter_names or self.active_adapters:
            if name in self.lora_A and name not in self.merged_adapters:
                delta = self.get_delta_weight(name)
                if safe_merge and not delta.isfinite().all():
                    raise NonFiniteWeightError(f"the adapter {name} has NaN or infinity for {self.parameter_name}")
                self._add(delta)
                self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Takes them off again, but for what quantizing twice has rounded."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.lora_A:
                self._add(-self.get_delta_weight(name))

    @torch.no_grad()
    def _add(self: Any, delta: torch.Tensor) -> None:
        """Of [experts, out, in], expert by expert."""
        experts = self.get_base_layer()
        codes, scales = (getattr(experts, self.parameter_name + end) for end in ("", SCALES))
        for expert, each in enumerate(delta.view(codes.shape)):  # of a single expert PEFT gives [out, in]
            weight = codes[expert] * (scales[expert].unsqueeze(-1) / _STEPS) + each
            found = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
            codes[expert], scales[expert] = found[0], found[1]


@cache
def _wrapper_of(original: type) -> type:
    return type(_WRAPPER, (_Int8Wrapper, original), {"__module__": original.__module__, "__doc__": original.__doc__})


def _blank(original: type) -> Any:
    return object.__new__(_wrapper_of(original))
