"""What there is to know of classes of experts: by transformers' experts interface, or by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_INTERFACE = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")


@dataclass(frozen=True)
class Kind:
    """A class of experts whose weights can be int8.

    Attributes:
        has_gate: Whether the first weight is `gate_up_proj`, or `up_proj`.
        has_bias: Whether its linear layers have biases.
        is_transposed: Whether its weights are [experts, in, out].
        is_sorted: Whether its forward pass takes rows that are sorted by expert, as many for each, already weighted.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_sorted: bool = False


_OWN: Mapping[str, Kind] = {
    "Llama4TextExperts": Kind(is_transposed=True, is_sorted=True),
    "Step3p7Experts": Kind(),
}


def kind_of(module: nn.Module) -> Kind | None:
    """What kind of experts a module of transformers is; None for one that computes in an unknown way of its own."""
    if all(hasattr(module, trait) for trait in _INTERFACE):
        traits: Any = module
        return Kind(bool(traits.has_gate), bool(traits.has_bias), bool(traits.is_transposed))
    return next((_OWN[each.__name__] for each in type(module).__mro__ if each.__name__ in _OWN), None)
