"""Modules whose weight a model reads itself instead of calling them, found in its source.

Such code would take int8 codes for the weight, or int8 for a dtype to compute in: `F.linear(x, self.proj.weight)`,
`x.to(self.proj.weight.dtype)`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from pyint8.quantizer.reads.functions import functions_to_read
from pyint8.quantizer.reads.interpreter import Interpreter
from pyint8.quantizer.reads.values import Model

__all__ = ["find_reads"]


def find_reads(
    modules: Mapping[str, nn.Module], candidates: Collection[nn.Module], facts: Mapping[str, Any], *, training: bool
) -> dict[nn.Module, str]:
    """The modules whose weight is read, with the function that reads it.

    Args:
        modules: All of a model, by name.
        candidates: Those that are to become int8.
        facts: Attributes that its modules or their configurations will have once it is loaded.
        training: Whether code that runs in training mode only counts too.
    """
    interpreter = Interpreter(Model(candidates, facts, training=training))
    replaced = set(candidates)
    for module, function in functions_to_read(modules):
        if module not in replaced:
            interpreter.enter(module, function)
    return interpreter.read
