"""From a weight's source to its int8 parameter: bitsandbytes' own operator, on bands of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pyint8.errors import QuantizationStateError
from pyint8.quantizer.backend import bitsandbytes
from pyint8.quantizer.experts.names import SCALES
from pyint8.quantizer.health import WeightHealth

# How much is quantized at once on the CPU, where bitsandbytes' operator passes over the rows six times: as much as fits
# in the cache. See docs/performance.md, "Quantizing on the CPU in pieces".
_CPU_PIECE_ELEMENTS = 1 << 19
# Elsewhere: bitsandbytes' kernel counts elements in 32 bits.
_PIECE_ELEMENTS = 2**31 - 1


class Quantized(Protocol):
    """A weight that was quantized on its way: `tensor` int8 codes [out, in], `scales` fp32 [out], `marks` uint8 [out],
    not 0 where a row has NaN, infinity or a value beyond fp16; on one device."""

    @property
    def tensor(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor | None: ...
    @property
    def marks(self) -> torch.Tensor | None: ...


class WeightSource(Protocol):
    """A weight to quantize, from a stream or from memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def bands(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, rows): the weight in order, in its stored dtype; a band is valid until the next."""

    def whole(self) -> torch.Tensor:
        """The weight in its stored dtype, in memory of its own."""

    def later(self) -> torch.Tensor:
        """As `whole`, but on a GPU its values may come later, until the load ends."""

    def transposed_half(self, model_dtype: torch.dtype) -> torch.Tensor:
        """The transposed weight, rounded to `model_dtype`, then to fp16; contiguous; valid until the next."""

    def made(self) -> Quantized | None:
        """The weight as it is quantized on its way, by bitsandbytes' `cint8_vector_quant`; its values may come later,
        until the load ends. None where it is not, and is to be had by the others."""


@dataclass(frozen=True)
class TensorSource:
    """A weight that is a tensor already: the result of a conversion (a split, a fusion) of checkpoint tensors."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def bands(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, self.tensor

    def whole(self) -> torch.Tensor:
        return self.tensor

    def later(self) -> torch.Tensor:
        return self.tensor

    def transposed_half(self, model_dtype: torch.dtype) -> torch.Tensor:
        return self.tensor.to(model_dtype).to(torch.float16).T.contiguous()

    def made(self) -> None:
        return None


def quantize(source: WeightSource, **how: Any) -> torch.Tensor:
    """The parameter that `Int8Params(weight).to(device)` gives; arguments as in `quantized`.

    Returns:
        `data` and its alias `CB` int8 [out, in], `SCB` fp32 [out].
    """
    return _int8_params(*quantized(source, **how))


def quantized(
    source: WeightSource,
    *,
    transposed: bool,
    model_dtype: torch.dtype,
    device: torch.device,
    name: str,
    health: WeightHealth,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight's codes int8 [out, in] and scales fp32 [out], made without moving it through the CPU.

    Rows are independent in LLM.int8(), so quantizing some of them at a time gives the same bytes.

    Args:
        source: The weight, [out, in] (or [in, out] if `transposed`).
        transposed: Whether it is stored transposed, as a Conv1D's weight is.
        model_dtype: Rounded to before fp16, as transformers casts before it quantizes.
        device: Where to quantize; bitsandbytes' results differ between kinds of devices.
        name: For errors.
        health: Checks all rows.
    """
    made = source.made()
    if made is not None:
        assert made.scales is not None
        assert made.marks is not None
        health.watch_marks(name, made.marks)
        return made.tensor, made.scales
    rows = source.shape[1] if transposed else source.shape[0]
    codes = scales = None
    for row, half in _half_rows(source, transposed, model_dtype, device):
        some_codes, some_scales, _ = bitsandbytes.functional.int8_vectorwise_quant(half)
        health.watch(name, row, half, some_scales)
        if len(half) == rows:  # the last; errors of a generator that is left before its end would be lost
            codes, scales = some_codes, some_scales
            continue
        if codes is None or scales is None:
            codes = torch.empty((rows, half.shape[1]), dtype=torch.int8, device=some_codes.device)
            scales = torch.empty(rows, dtype=torch.float32, device=some_codes.device)
        codes[row : row + len(half)] = some_codes
        scales[row : row + len(half)] = some_scales
    assert codes is not None
    assert scales is not None
    return codes, scales


def codes_of(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [out, in] and scales fp32 [out] of a weight [out, in] of any float dtype, on its device."""
    found = [
        bitsandbytes.functional.int8_vectorwise_quant(piece.to(torch.float16))[:2] for _, piece in _pieces(0, weight)
    ]
    codes, scales = zip(*found, strict=True)
    return torch.cat(codes), torch.cat(scales)


def checked_scales(name: str, codes: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The scales of an int8 weight of a checkpoint.

    Raises:
        QuantizationStateError: It has none, or is not int8.
    """
    again = "save the quantized model again"
    if scales is None:
        raise QuantizationStateError(f"an int8 weight without its scales (its `SCB` tensor); {again}", tensor=name)
    if codes.dtype != torch.int8:
        raise QuantizationStateError(
            f"scales (`SCB`) for a weight of dtype {codes.dtype}, which must be int8; {again}", tensor=name
        )
    return scales


class Experts:
    """The weights of all experts of a module, as they become int8, a part of one expert at a time.

    Args:
        name: Of the parameter.
        shape: [experts, out, in].
        model_dtype: As in `quantize`.
        device: The same.
        health: Checks all rows.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], model_dtype: torch.dtype, device: torch.device, health: WeightHealth
    ) -> None:
        self._name = name
        self._shape = shape
        self._how: dict[str, Any] = {"model_dtype": model_dtype, "device": device, "name": name, "health": health}
        self._codes: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None

    def put(self, source: WeightSource, expert: int, row: int, *, transposed: bool, name: str | None = None) -> None:
        """Quantizes rows of an expert from `row` on, [rows, in], or [in, rows] if transposed; `name` is for errors."""
        how = self._how if name is None else {**self._how, "name": name}
        self._put(*quantized(source, transposed=transposed, **how), expert, row)

    def put_codes(
        self, scales: torch.Tensor | None, codes: torch.Tensor, expert: int, row: int, *, name: str | None = None
    ) -> None:
        """Takes rows that are int8 already: scales fp32 [rows], codes [rows, in]."""
        device, health = self._how["device"], self._how["health"]
        if scales is not None:
            health.watch_scales(name or self._name, scales)
        self._put(codes.to(device), None if scales is None else scales.to(device), expert, row)

    def _put(self, codes: torch.Tensor, scales: torch.Tensor | None, expert: int, row: int) -> None:
        if self._codes is None:
            self._codes = torch.empty(self._shape, dtype=torch.int8, device=codes.device)
        self._codes[expert, row : row + len(codes)] = codes
        if scales is None:
            return
        if self._scales is None:
            self._scales = torch.empty(self._shape[:2], dtype=torch.float32, device=codes.device)
        self._scales[expert, row : row + len(codes)] = scales

    def tensors(self) -> dict[str, torch.Tensor]:
        """Codes int8 [experts, out, in], a parameter, and scales, if any were put, fp32 [experts, out]."""
        assert self._codes is not None
        return experts_tensors(self._name, self._codes, self._scales)


def experts_tensors(name: str, codes: torch.Tensor, scales: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of all experts of a module by their names: codes int8 [experts, out, in], a parameter, and scales,
    if there are any, fp32 [experts, out]."""
    made: dict[str, torch.Tensor] = {name: torch.nn.Parameter(codes, requires_grad=False)}
    if scales is not None:
        made[name + SCALES] = scales
    return made


def _half_rows(
    source: WeightSource, transposed: bool, model_dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, fp16 rows) of the weight, in order, as the operator takes them."""
    if transposed:
        half = source.transposed_half(model_dtype).to(device)
        yield from _pieces(0, half)
        return
    for first, band in source.bands():
        for row, piece in _pieces(first, band.to(device)):
            yield row, piece.to(model_dtype).to(torch.float16)


def _pieces(first: int, band: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Rows that are quantized at once: on a GPU as many as can be, on the CPU those that fit in the cache."""
    if not band.numel():
        yield first, band
        return
    most = _CPU_PIECE_ELEMENTS if band.device.type == "cpu" else _PIECE_ELEMENTS
    step = max(1, most // band[0].numel())
    for row in range(0, len(band), step):
        yield first + row, band[row : row + step]


def pre_quantized(codes: torch.Tensor, scales: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The parameter of a checkpoint that holds int8 codes [out, in] and fp32 scales [out]."""
    return _int8_params(codes.to(device), scales.to(device))


def dequantized(
    codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype, device: torch.device, *, transposed: bool
) -> torch.Tensor:
    """The weight of codes [out, in] and scales fp32 [out], by bitsandbytes' own arithmetic; `transposed`, [in, out]."""
    weight: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(codes.to(device), scales.to(device))
    return (weight.T.contiguous() if transposed else weight).to(dtype)


def stand_in(shape: torch.Size) -> torch.Tensor:
    """The parameter of a weight [out, in], on meta: without values."""
    codes = torch.empty(shape, dtype=torch.int8, device="meta")
    return _int8_params(codes, torch.empty(shape[0], dtype=torch.float32, device="meta"))


def _int8_params(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    parameter: torch.Tensor = bitsandbytes.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
    parameter.CB = parameter.data  # type: ignore[attr-defined]
    parameter.SCB = scales  # type: ignore[attr-defined]
    return parameter


def sixteen_bit(
    source: WeightSource, *, transposed: bool, model_dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The weight of a layer that quantizes in every forward pass (`has_fp16_weight`).

    On the CPU it is an `Int8Params` that was never quantized, elsewhere a plain tensor, as bitsandbytes'
    `Int8Params.to` gives.
    """
    value = source.whole().to(device).to(model_dtype)
    value = value.T if transposed else value
    if device.type != "cpu":
        return value
    parameter: torch.Tensor = bitsandbytes.nn.Int8Params(value, requires_grad=False, has_fp16_weights=True)
    return parameter
