"""Triton kernels for experts in int8: codes are cast in registers, and a row's scale is applied to its sum.

Nothing here waits for the device: how many rows an expert has is looked up by the kernels, which are launched for as
many tiles as there can be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pyint8.quantizer.experts import hopper

_STEPS = tl.constexpr(127.0)
_SORT_BLOCK = 32
_FEW_PAIRS = 16384  # sorted by counting, which takes the square of their number but one kernel


class Tiles(NamedTuple):
    """How a product is cut.

    Attributes:
        rows: Of the activations, in one tile.
        columns: Of the result, in one tile.
        inner: Of the sum, in one step.
        warps: That compute a tile.
        stages: Steps that are on their way at once.
        group: Tiles of rows that go through the columns together, so that they share the weights in the cache.
        is_left: Whether weights are the left operand, which tensor cores take out of registers.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    group: int = 1
    is_left: bool = False


# By the rows that an expert has on average, at most; of two that are as fast, the smaller one. See docs/performance.md,
# "Experts in int8".
_TILES = {
    12: Tiles(16, 64, 256, 4, 3),
    24: Tiles(32, 64, 128, 4, 4, 4),
    48: Tiles(64, 128, 128, 4, 3, 4),
    96: Tiles(64, 128, 64, 4, 4, 4),
    512: Tiles(128, 128, 64, 4, 3, 8),
}
_MOST = Tiles(256, 128, 64, 8, 3, 8, is_left=True)


def tiles_for(rows: int, experts: int) -> Tiles:
    return next((tiles for most, tiles in _TILES.items() if rows <= most * experts), _MOST)


# --- order ------------------------------------------------------------------------------------------------------------


@triton.jit
def _order_kernel(ids, tokens, places, ends, pairs, k, experts, pair_blocks, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The places of pairs when sorted by expert, each the number of those before it; and where experts end."""
    block = tl.program_id(0)
    each = tl.arange(0, STEP)
    count = tl.zeros((BLOCK, STEP), tl.int32)
    if block < pair_blocks:
        mine = block * BLOCK + tl.arange(0, BLOCK)
        my_id = tl.load(ids + mine, mask=mine < pairs, other=0)
        for begin in range(0, pairs, STEP):
            other = begin + each
            other_id = tl.load(ids + other, mask=other < pairs, other=experts + pairs)
            is_smaller = other_id[None, :] < my_id[:, None]
            is_earlier = (other_id[None, :] == my_id[:, None]) & (other[None, :] < mine[:, None])
            count += (is_smaller | is_earlier).to(tl.int32)
        place = tl.sum(count, 1)
        tl.store(places + mine, place, mask=mine < pairs)
        tl.store(tokens + place, mine // k, mask=mine < pairs)
    else:
        expert = (block - pair_blocks) * BLOCK + tl.arange(0, BLOCK)
        for begin in range(0, pairs, STEP):
            other = begin + each
            other_id = tl.load(ids + other, mask=other < pairs, other=experts + pairs)
            count += (other_id[None, :] <= expert[:, None]).to(tl.int32)
        tl.store(ends + expert, tl.sum(count, 1), mask=expert < experts)


def order(ids: torch.Tensor, k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pairs of token and expert sorted by expert.

    Args:
        ids: The expert of each pair, [pairs]; those from `experts` on are none and come last.
        k: Pairs of a token.
        experts: How many there are.

    Returns:
        int32: the token whose pair is at each place, [pairs]; the place of each pair, [pairs]; where each expert's
        pairs end, [experts].
    """
    pairs = len(ids)
    if pairs > _FEW_PAIRS:
        in_order, chosen = torch.sort(ids, stable=True)
        places = torch.empty_like(chosen, dtype=torch.int32)
        places[chosen] = torch.arange(pairs, device=ids.device, dtype=torch.int32)
        every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
        return (chosen // k).int(), places, torch.searchsorted(in_order, every, right=True, out_int32=True)
    found = torch.empty(2 * pairs + experts, device=ids.device, dtype=torch.int32)
    tokens, places, ends = found.split((pairs, pairs, experts))
    pair_blocks = triton.cdiv(pairs, _SORT_BLOCK)
    grid = (pair_blocks + triton.cdiv(experts, _SORT_BLOCK),)
    _order_kernel[grid](ids, tokens, places, ends, pairs, k, experts, pair_blocks, BLOCK=_SORT_BLOCK, STEP=128)
    return tokens, places, ends


# --- products ---------------------------------------------------------------------------------------------------------


@triton.jit
def _find_tile(ends, tile, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, end of its rows) of a tile; those behind the last end have the expert `experts`."""
    each = tl.arange(0, EXPERTS)
    end = tl.load(ends + each, mask=each < experts, other=0)
    begin = tl.load(ends + each - 1, mask=(each > 0) & (each < experts), other=0)
    count = tl.where(each < experts, tl.cdiv(end - begin, ROWS), 0)
    last = tl.cumsum(count, 0)
    total = tl.sum(count, 0)
    expert = tl.where(tile < total, tl.sum(((last <= tile) & (each < experts)).to(tl.int32), 0), experts)
    before = tl.sum(tl.where(each < expert, count, 0), 0)
    row = tl.sum(tl.where(each == expert, begin, 0), 0) + (tile - before) * ROWS
    row_end = tl.sum(tl.where(each == expert, end, 0), 0)
    if tile >= total:
        row = tl.max(end, 0) + (tile - total) * ROWS
    return expert, row, row_end


@triton.jit
def _linear_kernel(
    x, tokens, codes, scales, y, ends,
    rows, experts, inner, columns, most,
    x_stride, expert_stride, column_stride, inner_stride, scale_stride, y_stride,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr,
    IS_LEFT: tl.constexpr, GATED: tl.constexpr, GATHERED: tl.constexpr, SCALED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y[row, column] = sum of x[row, i] * codes[expert, column, i], times the column's scale if SCALED.

    GATHERED: row `r` is row `tokens[r]` of x. GATED: silu of column c, times column `columns + c`; a tile takes
    such pairs of columns by turns. EVEN: columns and steps come out even.
    """
    STORED: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    column_tiles = tl.cdiv(columns, STORED)
    group = tl.program_id(0) // (GROUP * column_tiles)
    within = tl.program_id(0) % (GROUP * column_tiles)
    grouped = tl.minimum(most - group * GROUP, GROUP)
    expert, first, end = _find_tile(ends, group * GROUP + within % grouped, experts, EXPERTS, ROWS)
    row = first + tl.arange(0, ROWS)
    stored = (within // grouped) * STORED + tl.arange(0, STORED)
    is_stored = stored < columns
    y_at = y + row.to(tl.int64)[None, :] * y_stride + stored[:, None]
    if expert < experts:
        is_row = row < end
        source = row
        if GATHERED:
            source = tl.load(tokens + row, mask=is_row, other=0)
        column = (within // grouped) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < columns
        if GATED:
            is_column = column // 2 < columns
            column = column // 2 + (column % 2) * columns
        step = tl.arange(0, INNER)
        x_at = x + source.to(tl.int64)[None, :] * x_stride + step[:, None]
        weight = codes + expert.to(tl.int64) * expert_stride
        w_at = weight + column.to(tl.int64)[:, None] * column_stride + step[None, :] * inner_stride
        total = tl.zeros((COLUMNS, ROWS) if IS_LEFT else (ROWS, COLUMNS), tl.float32)
        for begin in range(0, inner, INNER):
            if EVEN:
                a = tl.load(x_at, mask=is_row[None, :], other=0.0)
                w = tl.load(w_at)
            else:
                is_inner = begin + step < inner
                a = tl.load(x_at, mask=is_row[None, :] & is_inner[:, None], other=0.0)
                w = tl.load(w_at, mask=is_column[:, None] & is_inner[None, :], other=0)
            if IS_LEFT:
                total = tl.dot(w.to(a.dtype), a, total, input_precision=PRECISION)
            else:
                total = tl.dot(tl.trans(a), tl.trans(w.to(a.dtype)), total, input_precision=PRECISION)
            x_at += INNER
            w_at += INNER * inner_stride
        if not IS_LEFT:
            total = tl.trans(total)
        if SCALED:
            scale = tl.load(scales + expert.to(tl.int64) * scale_stride + column, mask=is_column, other=0.0)
            total *= (scale / _STEPS)[:, None]
        if GATED:
            gate, up = tl.split(tl.permute(tl.reshape(total, (STORED, 2, ROWS)), (0, 2, 1)))
            total = gate / (1.0 + tl.exp(-gate)) * up  # in fp32: what is rounded is the product alone
        tl.store(y_at, total.to(y.dtype.element_ty), mask=is_row[None, :] & is_stored[:, None])
    else:  # rows of none
        nothing = tl.zeros((STORED, ROWS), tl.float32).to(y.dtype.element_ty)
        tl.store(y_at, nothing, mask=(row < rows)[None, :] & is_stored[:, None])


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    ends: torch.Tensor,
    *,
    tokens: torch.Tensor | None = None,
    gated: bool = False,
    transposed: bool = False,
    tiles: Tiles | None = None,
) -> torch.Tensor:
    """All rows times the weight of their expert.

    Args:
        x: [rows, in], sorted by expert; or with `tokens` [tokens, in], of which row `tokens[r]` is the r-th.
        codes: int8 [experts, out, in].
        scales: fp32 [experts, out]; None leaves them out.
        ends: int32 [experts]: where each expert's rows end.
        tokens: int32 [rows].
        gated: Of 2 * n outputs, the first n go through silu and are multiplied with the others.
        transposed: The sum is over `out`: x is [rows, out], the result [rows, in].
        tiles: How to cut it; by default as the number of rows asks for, or by the kernel of `hopper`.

    Returns:
        [rows, out], or half of that if gated; rows behind the last end are zero.
    """
    if tiles is None and scales is not None and not transposed:
        found = hopper.linear(x, codes, scales, ends, tokens=tokens, gated=gated)
        if found is not None:
            return found
    experts, out, inner = codes.shape
    strides = (codes.stride(0), codes.stride(1), codes.stride(2))
    if transposed:
        out, inner, strides = inner, out, (strides[0], strides[2], strides[1])
    columns = out // 2 if gated else out
    rows = len(x) if tokens is None else len(tokens)
    y = x.new_empty(rows, columns)
    if rows == 0:
        return y
    cut = tiles or tiles_for(rows, experts)
    most = rows // cut.rows + min(rows, experts) + 1
    stored = cut.columns // 2 if gated else cut.columns
    _linear_kernel[(triton.cdiv(columns, stored) * most,)](
        x, x if tokens is None else tokens, codes, codes if scales is None else scales, y, ends,
        rows, experts, inner, columns, most,
        x.stride(0), *strides, 0 if scales is None else scales.stride(0), y.stride(0),
        EXPERTS=triton.next_power_of_2(experts), ROWS=cut.rows, COLUMNS=cut.columns, INNER=cut.inner, GROUP=cut.group,
        IS_LEFT=cut.is_left, GATED=gated, GATHERED=tokens is not None, SCALED=scales is not None,
        EVEN=columns % stored == 0 and inner % cut.inner == 0,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return y


def linear_backward(grad: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradient of `linear`'s x, from that of its result [rows, out]."""
    rows = torch.arange(len(grad), device=grad.device, dtype=ends.dtype)
    expert = torch.searchsorted(ends, rows, right=True).clamp(max=len(codes) - 1)  # rows of none come to nothing
    scaled = (grad.float() * (scales[expert] / 127.0)).to(grad.dtype)
    return linear(scaled, codes, None, ends, transposed=True)


# --- sums of a token's experts ----------------------------------------------------------------------------------------


@triton.jit
def _sum_kernel(
    outer, places, weights, ids, y, experts, columns, outer_stride, y_stride, K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for each in range(K):
        pair = token * K + each
        place = tl.load(places + pair)
        is_here = tl.load(ids + pair) < experts
        row = tl.load(outer + place.to(tl.int64) * outer_stride + column, mask=column < columns, other=0.0)
        total += tl.where(is_here, row.to(tl.float32) * tl.load(weights + pair).to(tl.float32), 0.0)
    tl.store(y + token.to(tl.int64) * y_stride + column, total.to(y.dtype.element_ty), mask=column < columns)


def weighted_sum(
    outer: torch.Tensor, places: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int
) -> torch.Tensor:
    """[tokens, columns]: the rows of `outer` [pairs, columns] of each token, times their weights [tokens, k]."""
    tokens, k = weights.shape
    y = outer.new_empty(tokens, outer.shape[1])
    columns = 1024 if tokens > 64 else 256
    _sum_kernel[(triton.cdiv(outer.shape[1], columns), tokens)](
        outer, places, weights, ids, y, experts, outer.shape[1], outer.stride(0), y.stride(0), K=k, COLUMNS=columns,
    )  # fmt: skip
    return y


def forward(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, *layers: torch.Tensor) -> torch.Tensor:
    """A whole module of experts whose gate is silu; see `pyint8::experts_forward`."""
    up_codes, up_scales, down_codes, down_scales = layers
    experts = len(up_codes)
    if len(x) == 0:
        return x.new_empty(0, down_codes.shape[1])
    flat = ids.reshape(-1)
    tokens, places, ends = order(flat, ids.shape[1], experts)
    inner = linear(x, up_codes, up_scales, ends, tokens=tokens, gated=True)
    outer = linear(inner, down_codes, down_scales, ends)
    return weighted_sum(outer, places, flat, weights.contiguous(), experts)
