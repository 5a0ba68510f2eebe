"""Builds a model without initializing tensors on meta.

torch runs every initializer on meta too, through its decompositions, which takes a large part of the time in which
transformers builds a model (docs/performance.md, "Building on meta"). Tensors on meta have no storage, and
drawing values for them does not advance a generator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

_INITIALIZERS = frozenset(
    {
        *(value for name, value in vars(torch.nn.init).items() if name.endswith("_") and not name.startswith("_")),
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
        torch.Tensor.zero_,
        torch.Tensor.fill_,
    }
)


class NoInitializationOnMeta(TorchFunctionMode):
    """While it is active, initializers leave tensors on meta alone; all others are initialized as usual."""

    def end(self) -> None:
        """Leaves the mode, unless another mode was entered since: modes are a stack, so `end` must be called again once
        the other is gone."""
        if _get_current_function_mode() is self:
            self.__exit__(None, None, None)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _INITIALIZERS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return function(*args, **kwargs)
