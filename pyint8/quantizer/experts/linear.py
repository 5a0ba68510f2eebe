"""A linear layer of all experts at once, on rows that are sorted by expert: activations stay in 16 or 32 bit.

`pyint8::experts_linear` is an operator of torch, so that `torch.compile` and CUDA graphs take it as it is. On a GPU
with Triton a kernel computes it without waiting for the device; elsewhere it goes from expert to expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import linear, silu

_STEPS = 127.0  # of a code, from 0 to a row's largest value
# Of an expert's codes, cast at once: what stays in a core's cache, and takes no memory to speak of.
_PIECE_ELEMENTS = 1 << 20


@cache
def _kernels() -> ModuleType | None:
    """Those of Triton, where it is installed."""
    if find_spec("triton") is None:
        return None
    from pyint8.quantizer.experts import kernels

    return kernels


@torch.library.custom_op("pyint8::experts_linear", mutates_args=())
def experts_linear(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each row times the weight of its expert.

    Args:
        x: [rows, in], sorted by expert, of any float dtype.
        codes: int8 [experts, out, in]; a weight is codes * scales / 127.
        scales: fp32 [experts, out].
        ends: int32 [experts]: where each expert's rows end.

    Returns:
        [rows, out], of the dtype of `x`; rows behind the last end are zero.
    """
    return _one_by_one(x, codes, scales, ends)


def _one_by_one(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], codes.shape[1])
    dtype = x.dtype if _multiplies(x) else torch.float32
    for expert, begin, end in _groups(ends):
        rows = x[begin:end].to(dtype)
        for first, piece in _pieces(codes[expert], dtype):
            last = first + len(piece)
            y[begin:end, first:last] = linear(rows, piece) * (scales[expert, first:last] / _STEPS)
    return y


@torch.library.custom_op("pyint8::experts_linear_backward", mutates_args=())
def experts_linear_backward(
    grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The gradient of `x` in `experts_linear`, from that of its result [rows, out]."""
    return _one_by_one_backward(grad, codes, scales, ends)


def _one_by_one_backward(
    grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    found = torch.zeros(grad.shape[0], codes.shape[2], dtype=torch.float32, device=grad.device)
    for expert, begin, end in _groups(ends):
        rows = grad[begin:end].float() * (scales[expert] / _STEPS)
        for first, piece in _pieces(codes[expert], torch.float32):
            found[begin:end] += rows[:, first : first + len(piece)] @ piece
    return found.to(grad.dtype)


@torch.library.custom_op("pyint8::experts_forward", mutates_args=())
def experts_forward(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    up_codes: torch.Tensor,
    up_scales: torch.Tensor,
    down_codes: torch.Tensor,
    down_scales: torch.Tensor,
) -> torch.Tensor:
    """All of a module of experts without biases whose gate is silu of the first half, times the second. No gradients.

    Args:
        x: [tokens, hidden], of any float dtype.
        ids: The experts of each token, [tokens, k]; those from the number of experts on are none.
        weights: Their routing weights, [tokens, k].
        up_codes: int8 [experts, 2 * inner, hidden].
        up_scales: fp32 [experts, 2 * inner].
        down_codes: int8 [experts, hidden, inner].
        down_scales: fp32 [experts, hidden].

    Returns:
        [tokens, hidden], of the dtype of `x`.
    """
    return _forward_one_by_one(x, ids, weights, up_codes, up_scales, down_codes, down_scales)


def _forward_one_by_one(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *layers: torch.Tensor
) -> torch.Tensor:
    up_codes, up_scales, down_codes, down_scales = layers
    order, places, ends = sort_pairs(ids.reshape(-1), len(up_codes))
    gate, up = _one_by_one(x[order // ids.shape[1]], up_codes, up_scales, ends).chunk(2, dim=-1)
    outer = _one_by_one(silu(gate) * up, down_codes, down_scales, ends)
    return weighted_sum(outer, places, weights, ids < len(up_codes)).to(x.dtype)


def sort_pairs(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of token and expert, sorted by expert.

    Args:
        ids: The expert of each pair, [pairs]; those from `experts` on are none and come last.
        experts: How many there are.

    Returns:
        Which pair is at each place, [pairs]; the place of each pair, [pairs]; where each expert's pairs end, int32
        [experts].
    """
    in_order, order = torch.sort(ids, stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    return order, places, torch.searchsorted(in_order, every, right=True, out_int32=True)


def weighted_sum(
    outer: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, is_here: torch.Tensor | None
) -> torch.Tensor:
    """[tokens, hidden]: the sum of each token's rows of `outer` [pairs, hidden], times its weights [tokens, k]."""
    weighted = outer[places] * weights.reshape(-1, 1)
    if is_here is not None:
        weighted = weighted.masked_fill(~is_here.reshape(-1, 1), 0.0)
    return weighted.view(*weights.shape, outer.shape[-1]).sum(dim=1)


@experts_linear.register_kernel("cuda")
def _(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return _on_gpu("linear", _one_by_one, x, *others)


@experts_linear_backward.register_kernel("cuda")
def _(grad: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return _on_gpu("linear_backward", _one_by_one_backward, grad, *others)


@experts_forward.register_kernel("cuda")
def _(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return _on_gpu("forward", _forward_one_by_one, x, *others)


def _on_gpu(name: str, otherwise: Callable[..., torch.Tensor], x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """What `kernels` has of this name, or what is done without Triton.

    Triton launches on the current device, which is another one than that of `x` for layers on a second GPU.
    """
    kernels = _kernels()
    if kernels is None:
        return otherwise(x, *others)
    with torch.cuda.device(x.device):
        y: torch.Tensor = getattr(kernels, name)(x.contiguous(), *others)
    return y


def _groups(ends: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(expert, begin, end) of those that have rows."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if begin < end:
            yield expert, begin, end
        begin = end


def _pieces(codes: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows in `dtype`)."""
    step = max(1, _PIECE_ELEMENTS // codes.shape[1])
    for first in range(0, len(codes), step):
        yield first, codes[first : first + step].to(dtype)


def _multiplies(x: torch.Tensor) -> bool:
    """Whether a product of these activations and codes, which are exact in any dtype, is fast and not too large for the
    dtype: of fp16 it can be."""
    if x.dtype == torch.bfloat16:
        return x.device.type != "cpu" or _cpu_multiplies_bfloat16()
    return x.dtype == torch.float64


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for it; elsewhere it is slower than fp32."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check is not None and check() for check in checks)


@experts_linear.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


@experts_linear_backward.register_fake
def _(grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return grad.new_empty(grad.shape[0], codes.shape[2])


@experts_forward.register_fake
def _(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    *_, down_codes, _ = others
    return x.new_empty(x.shape[0], down_codes.shape[1])


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(context: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return experts_linear_backward(grad, *context.saved_tensors), None, None, None


experts_linear.register_autograd(_backward, setup_context=_keep)
