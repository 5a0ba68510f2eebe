"""Modules of experts whose weights are int8: of a class of ours, made for each class of transformers.

transformers keeps the weights of all experts of a layer in one parameter, [experts, out, in], or [experts, in, out]
where the class says that it is transposed. Here they are codes [experts, out, in] in either case, of the same name,
with a buffer of scales beside them. All else, biases and gates among them, is what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from pyint8.errors import ModelNotSupportedError
from pyint8.quantizer.experts.kinds import Kind, kind_of
from pyint8.quantizer.experts.names import SCALES, WEIGHTS

logger = logging.getLogger(__name__)


class Int8Experts(nn.Module):
    """What makes a class of transformers one whose experts are int8; mixed into it by `int8_class`.

    Attributes:
        kind: Of the class that it was made for.
        updates: Of its weights, in the forward pass under way.
        is_transposed: Always False: codes are [experts, out, in].
        was_transposed: Whether the weights they were made of are stored as [experts, in, out].
    """

    kind: Kind
    is_transposed = False
    was_transposed = False
    updates: Mapping[str, Sequence[Any]] = MappingProxyType({})
    _compute: Callable[..., torch.Tensor]

    def forward(self, *inputs: torch.Tensor, **named: torch.Tensor) -> torch.Tensor:
        if is_parametrized(self):
            raise ModelNotSupportedError(
                f"something changes the weights of {type(self).__name__} in every forward pass (a parametrization), "
                "which are int8 codes: load the model with Int8Config(experts=False)"
            )
        return self._compute(self, *inputs, **named)

    @contextmanager
    def updated(self, name: str, updates: Sequence[Any]) -> Iterator[None]:
        """While the block lasts, the weight `name` is what it is and low-rank updates (see `adapters.Update`)."""
        before = dict(self.updates)
        self.updates = {**before, name: (*before.get(name, ()), *updates)}
        try:
            yield
        finally:
            self.updates = before

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """As a module's own; but scales stay fp32, whatever the model is cast to."""
        before = {name: scales for name, scales in self._buffers.items() if name.endswith(SCALES)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scales in before.items():
            moved = self._buffers[name]
            if scales is not None and moved is not None and moved.dtype != torch.float32:
                self._buffers[name] = scales.to(moved.device)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """By the class that it was made for: the one made of it has no name in any module."""
        return _blank, (type(self).__mro__[2], self.kind), self.__dict__


@cache
def int8_class(original: type, kind: Kind) -> type[Int8Experts]:
    """The class of modules of `original` whose experts are int8."""
    from pyint8.quantizer.experts import adapters, forward  # registers operators, which takes 15 ms

    adapters.register()
    compute = forward.sorted_experts_forward if kind.is_sorted else forward.int8_experts_forward
    fields = {"__module__": original.__module__, "__doc__": Int8Experts.__doc__, "kind": kind}
    fields["_compute"] = staticmethod(compute)  # type: ignore[assignment]
    return type(f"Int8{original.__name__}", (Int8Experts, original), fields)


def _blank(original: type, kind: Kind) -> Int8Experts:
    made = int8_class(original, kind)
    return made.__new__(made)


def why_not_experts(module: nn.Module) -> str | None:
    """None for a module of experts that can be int8; otherwise the reason, or "" for what are no experts."""
    weights = [name for name in WEIGHTS if _is_stack(module._parameters.get(name))]
    if not weights:
        return ""
    kind = kind_of(module)
    if kind is None:
        return f"{type(module).__name__} computes with its experts in a way of its own"
    first = "gate_up_proj" if kind.has_gate else "up_proj"
    if weights != [first, "down_proj"]:
        return f"{type(module).__name__} has other weights than {first} and down_proj"
    return None


def has_int8_experts(module: nn.Module) -> bool:
    """Whether it is a module of int8 experts."""
    return isinstance(module, Int8Experts)


def _is_stack(weight: torch.Tensor | None) -> bool:
    return weight is not None and weight.ndim == 3 and weight.is_floating_point()


def make_int8(module: nn.Module) -> None:
    """Gives a module of experts on meta codes and scales in place of its weights, without values."""
    stacks = {name: weight for name in WEIGHTS if (weight := module._parameters.get(name)) is not None}
    kind = kind_of(module)
    assert kind is not None
    for name, weight in stacks.items():
        experts, out, inner = weight.shape
        if kind.is_transposed:
            out, inner = inner, out
        codes = torch.empty(experts, out, inner, dtype=torch.int8, device="meta")
        module._parameters[name] = nn.Parameter(codes, requires_grad=False)
        module.register_buffer(name + SCALES, torch.empty(experts, out, dtype=torch.float32, device="meta"))
    module.__dict__.pop("is_transposed", None)  # the class says it
    if kind.is_transposed:
        module.__dict__["was_transposed"] = True
    original: type = type(module)
    module.__class__ = int8_class(original, kind)


def convert_experts(model: nn.Module, wanted: Callable[[str], bool]) -> tuple[dict[str, Int8Experts], dict[str, str]]:
    """Makes experts of a model on meta int8 ones: modules by name, and those that stay as they are, with reasons.

    Where there are none, a warning says so.
    """
    converted: dict[str, Int8Experts] = {}
    skipped: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        reason = why_not_experts(module)
        if reason is None and wanted(name):
            make_int8(module)
            converted[name] = cast(Int8Experts, module)
        elif reason != "":
            skipped[name] = reason or "in the list of modules to skip"
    if not converted and not skipped:
        logger.warning(
            "experts=True has no effect: this %s has no experts but, at most, linear modules", type(model).__name__
        )
    return converted, skipped
