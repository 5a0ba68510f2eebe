"""transformers' own lifecycle around tensors that arrive for free: the floor for loaders of transformers models.

`from_pretrained` runs in full, with its int8 quantizer, but every tensor it asks for is uninitialized memory, already
of the right dtype and on the right device, and quantizing makes an `Int8Params` of uninitialized codes. What remains is
the configuration, the model on meta, the replacing of its modules, the renaming of its keys and the loop over them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

_METHOD = "free-int8"


class FreeTensor:
    """Stands for a tensor of a checkpoint in transformers' state dict; `tensor[...]` makes it."""

    def __init__(self, shape: list[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.dtype, self._device = torch.Size(shape), dtype, device

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self._device)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


class _FreeStateDict(Mapping[str, FreeTensor]):
    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = {name: FreeTensor(shape, dtype, device) for name, shape in _shapes(folder)}

    def __getitem__(self, name: str) -> FreeTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        yield from ((name, fields["shape"]) for name, fields in header.items() if name != "__metadata__")


class _FreeQuantize(ConversionOps):
    """Codes and scales of the right shape, without looking at the weight."""

    def __init__(self, quantizer: Any) -> None:
        self.hf_quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        made = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            shape = model.get_parameter(name).shape
            parameter = bitsandbytes.nn.Int8Params(
                torch.empty(shape, dtype=torch.int8, device=tensor.device), requires_grad=False, has_fp16_weights=False
            )
            parameter.CB = parameter.data
            parameter.SCB = torch.empty(shape[0], device=tensor.device)
            made[name] = parameter
        return made


@register_quantization_config(_METHOD)
class _FreeInt8Config(transformers.BitsAndBytesConfig):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(load_in_8bit=True, **kwargs)
        self.quant_method = _METHOD


@register_quantizer(_METHOD)
class _FreeInt8Quantizer(Bnb8BitHfQuantizer):  # type: ignore[misc]
    def get_quantize_ops(self) -> ConversionOps:
        return _FreeQuantize(self)


def load(folder: Path, device: Any, dtype: torch.dtype = torch.float16) -> Any:
    """The model with uninitialized weights, as transformers builds it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, config.architectures[0])
    where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=_FreeStateDict(folder, dtype, where),
        device_map={"": device},
        dtype=dtype,
        quantization_config=_FreeInt8Config(),
    )


__all__ = ["FreeTensor", "load"]
