"""Which weights of a module are read, by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from pyint8.quantizer.modules import is_linear
from pyint8.quantizer.reads import find_reads


def reads(module: nn.Module, *, training: bool = False, **facts: Any) -> dict[str, str]:
    modules = dict(module.named_modules())
    linear = [one for one in modules.values() if is_linear(one)]
    found = find_reads(modules, linear, facts, training=training)
    return {name: found[one] for name, one in modules.items() if one in found}
