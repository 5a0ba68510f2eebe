"""What a load was asked for: one value for transformers models and plain modules alike."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pyint8.config import Int8Config, StreamOptions
from pyint8.errors import OptionError, first_names
from pyint8.host.imports import imported
from pyint8.placement.budget import MemoryBudget

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadRequest:
    """The arguments of a load, checked.

    Attributes:
        path: The folder, file or hub id that was named: of a model, or of an adapter.
        base: The model itself: the same, or the one that the adapter was made for.
        device_map: Where modules go.
        dtype: Of what is not quantized, and on the way to int8; "auto" for the checkpoint's own, None for float16.
        budget: Memory for planned device maps.
        config: What to quantize; None for the defaults, or for the configuration of an int8 checkpoint.
        offload_folder: For modules that the device map puts on "disk".
        strict: Whether values that cannot be quantized soundly, and contradictions in a checkpoint, are refused.
        options: How to move bytes.
        arguments: The rest, for from_pretrained.
    """

    path: str = ""
    base: str = ""
    device_map: Any = None
    dtype: torch.dtype | str | Mapping[str, torch.dtype | str] | None = "auto"
    budget: MemoryBudget = field(default_factory=MemoryBudget)
    config: Int8Config | None = None
    offload_folder: str | None = None
    strict: bool = True
    options: StreamOptions = field(default_factory=StreamOptions)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def allows_mismatched_shapes(self) -> bool:
        """Whether tensors of a wrong shape are left to transformers, which reports or reinitializes them."""
        return bool(self.arguments.get("ignore_mismatched_sizes", False))


def check_dtype(dtype: Any) -> Any:
    """The `dtype` argument with names replaced by dtypes: a torch.dtype, "auto", None, or a dict {"": one of such}.

    Raises:
        OptionError: It is anything else.
    """
    if isinstance(dtype, Mapping) and dtype:
        by_part = {part: check_dtype(value) for part, value in dtype.items()}
        if not all(isinstance(value, torch.dtype) for value in by_part.values()):
            raise OptionError(f'dtype is {dtype!r}; "auto" and None stand alone, not in a dict')
        if parts := [part for part in by_part if part]:
            logger.warning(
                "transformers loads all parts of a model in one dtype, here %s: what dtype says of %s has no effect",
                by_part.get("", torch.get_default_dtype()),
                first_names(parts),
            )
        return by_part
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if dtype is None or found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise OptionError(
        f'dtype is {dtype!r}; it must be a floating torch.dtype, the name of one, "auto" or None, or a dict of '
        'such, as transformers takes it: {"": ...}'
    )


def check_model(model: Any) -> None:
    """Raises OptionError unless it is a plain torch.nn.Module, a class that has from_pretrained, or None."""
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
