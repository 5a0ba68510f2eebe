"""A small module with everything the lifecycle decides about, and how to put it through the first of its verbs."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
from torch import nn
from transformers.pytorch_utils import Conv1D

from pyint8 import Int8Config
from pyint8.quantizer import Int8Quantizer, modules_to_keep


class Small(nn.Module):
    """Two layers, a norm, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(
            [nn.ModuleDict({"attn": Conv1D(24, 16), "mlp": nn.Linear(16, 40)}) for _ in range(2)]
        )
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 20, bias=False)
        self.lm_head.weight = self.embed.weight


INT8_LAYERS = {f"layers.{number}.{leaf}" for number in range(2) for leaf in ("attn", "mlp")}


def preprocessed(model: nn.Module, device_map: Any = None, *, skip: list[str] | None = None, **fields: Any) -> Any:
    quantizer = Int8Quantizer(Int8Config(**fields))
    quantizer.preprocess_model(model, skip=modules_to_keep(model) if skip is None else skip, device_map=device_map)
    return quantizer


def int8_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear8bitLt)}
