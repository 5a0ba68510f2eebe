"""The product of experts in int8 with many rows on Hopper, in Gluon: Triton where a kernel says which warps do what.

Each processor takes tiles of 256 rows by turns. One warp brings activations and codes by TMA; two groups of four
multiply them, each by its strip of 64 columns of the product. While the tensor cores work on one step, the codes of the
next become bf16 in registers, which are the left operand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pyint8.quantizer.experts.kernels import _find_tile

_ROWS = gl.constexpr(256)
_STRIP = gl.constexpr(64)  # columns of the product, of one group of warps
_INNER = gl.constexpr(64)  # of the sum, in one step
_GROUP = gl.constexpr(8)  # tiles of rows that go through the columns together: they share the weights in the cache
_STEPS = gl.constexpr(127.0)
_STAGES = 5  # steps that are on their way at once
_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.8

# Two codes to two numbers in bf16: 0x43vv is 128 + v of seven bits, and 128 or 256 is taken off by the eighth.
_CAST = gl.constexpr("""{
    .reg .b32 both, low, high;
    cvt.u32.u16 both, $2;
    prmt.b32 both, both, both, 0x2120;
    lop3.b32 low, both, 0x007f007f, 0x43004300, 0xea;
    lop3.b32 high, both, 0x00800080, 0x43004300, 0xea;
    sub.bf16x2 low, low, high;
    mov.b32 {$0, $1}, low;
}""")


# --- tiles ------------------------------------------------------------------------------------------------------------


@triton.jit
def _table_kernel(ends, table, rows, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Of each tile its expert, first row and end of rows, after the number of tiles; see `_find_tile`."""
    tile = tl.program_id(0)
    expert, first, end = _find_tile(ends, tile, experts, EXPERTS, ROWS)
    end = tl.minimum(first + ROWS, tl.where(expert < experts, end, rows))
    at = table + 1 + 3 * tile
    tl.store(at, expert)
    tl.store(at + 1, first)
    tl.store(at + 2, end)
    tl.store(table, tile + 1, mask=(first < rows) & (end == rows))


@gluon.jit
def _look_up(table, tile, row_tiles, column_tiles):
    """(expert, first row, end of its rows, tile of columns); rows behind the last end have the expert `experts`."""
    group = tile // (_GROUP * column_tiles)
    within = tile % (_GROUP * column_tiles)
    grouped = min(row_tiles - group * _GROUP, _GROUP)
    at = table + 1 + 3 * (group * _GROUP + within % grouped)
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), within // grouped


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    is_last = stage == STAGES - 1
    return gl.where(is_last, 0, stage + 1), gl.where(is_last, phase ^ 1, phase)


# --- what warps do ----------------------------------------------------------------------------------------------------


@gluon.jit
def _fetch(
    x, codes, table, full, empty, x_buffer, codes_buffer, experts, steps, out, columns, programs,
    STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """One warp: brings each step's activations and both strips of codes."""
    STORED: gl.constexpr = _STRIP if GATED else 2 * _STRIP
    row_tiles = gl.load(table)
    column_tiles = columns // STORED
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), row_tiles * column_tiles, programs):
        expert, first, _, column_tile = _look_up(table, tile, row_tiles, column_tiles)
        if expert < experts:
            for step in range(steps):
                mbarrier.wait(empty.index(stage), phase)
                ready = full.index(stage)
                mbarrier.expect(ready, _ROWS * _INNER * 2 + 2 * _STRIP * _INNER)
                _load(x, [first, step * _INNER], ready, x_buffer.index(stage))
                for strip in gl.static_range(2):
                    column = column_tile * STORED + strip * (STORED // 2)
                    into = codes_buffer.index(stage * 2 + strip)
                    if GATED:  # by turns eight columns of the gate and eight of the others
                        at = [expert, column // 8, 0, 0, step * (_INNER // 2)]
                        _load(codes, at, ready, into)
                    else:
                        _load(codes, [expert * out + column, step * (_INNER // 2)], ready, into)
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _cast(pairs, SUM: gl.constexpr):
    """A strip of pairs of codes, in registers as the left operand."""
    HELD: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[8, 0], [0, 4], [0, 8], [0, 16]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[_STRIP, _INNER // 2],
    )
    pairs = pairs.reshape([_STRIP, _INNER // 2]).load(HELD)
    even, odd = gl.inline_asm_elementwise(
        _CAST, "=h,=h,h", [pairs], dtype=(gl.bfloat16, gl.bfloat16), is_pure=False, pack=1
    )
    both = gl.join(even, odd).reshape([_STRIP, _INNER])
    return gl.convert_layout(both, gl.DotOperandLayout(operand_index=0, parent=SUM, k_width=2), assert_trivial=True)


@gluon.jit
def _sum(
    full, empty, x_buffer, codes_buffer, stage, phase, steps,
    SUM: gl.constexpr, WHICH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A strip of the product, fp32 [strip, rows], and the next stage and phase."""
    total = gl.zeros([_STRIP, _ROWS], gl.float32, layout=SUM)
    mbarrier.wait(full.index(stage), phase)
    w = _cast(codes_buffer.index(stage * 2 + WHICH), SUM)
    for step in range(steps - 1):
        total = warpgroup_mma(w, x_buffer.index(stage).permute([1, 0]), total, is_async=True)
        mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=step > 0)
        stage, phase = _next(stage, phase, STAGES)
        mbarrier.wait(full.index(stage), phase)
        next_w = _cast(codes_buffer.index(stage * 2 + WHICH), SUM)
        mbarrier.wait(full.index(stage), phase)  # long so; without a branch here ptxas casts when products have ended
        total, w = warpgroup_mma_wait(0, deps=[total, w])
        w = next_w
    total = warpgroup_mma(w, x_buffer.index(stage).permute([1, 0]), total, is_async=True)
    mbarrier.arrive(empty.index((stage + STAGES - 1) % STAGES), count=1, pred=steps > 1)
    total, w = warpgroup_mma_wait(0, deps=[total, w])
    mbarrier.arrive(empty.index(stage), count=1)
    stage, phase = _next(stage, phase, STAGES)
    return total, stage, phase


@gluon.jit
def _store(total, y, column, first, end, y_stride):
    """Of `total` [columns, rows], what is before `end`."""
    COLUMNS: gl.constexpr = total.shape[0]
    COALESCED: gl.constexpr = gl.BlockedLayout([8, 1], [COLUMNS // 8, 256 // COLUMNS], [1, 4], [0, 1])
    total = gl.convert_layout(total.to(y.dtype.element_ty), COALESCED)
    columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, COALESCED))
    rows = first + gl.arange(0, _ROWS, layout=gl.SliceLayout(0, COALESCED))
    at = y + rows.to(gl.int64)[None, :] * y_stride + columns[:, None]
    gl.store(at, total, mask=(rows < end)[None, :])


@gluon.jit
def _multiply(
    scales, y, table, full, empty, x_buffer, codes_buffer, experts, steps, out, columns, programs, y_stride,
    WHICH: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """Four warps: the first or second strip of each tile."""
    SUM: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, _ROWS, 16])
    STORED: gl.constexpr = _STRIP // 2 if GATED else _STRIP
    row_tiles = gl.load(table)
    column_tiles = columns // (2 * STORED)
    stage = 0
    phase = 0
    for tile in range(gl.program_id(0), row_tiles * column_tiles, programs):
        expert, first, end, column_tile = _look_up(table, tile, row_tiles, column_tiles)
        column = (2 * column_tile + WHICH) * STORED
        if expert < experts:
            total, stage, phase = _sum(full, empty, x_buffer, codes_buffer, stage, phase, steps, SUM, WHICH, STAGES)
            each = gl.arange(0, _STRIP, layout=gl.SliceLayout(1, SUM))
            if GATED:
                each = each // 16 * 8 + each % 8 + each // 8 % 2 * columns
            total *= (gl.load(scales + expert.to(gl.int64) * out + column + each) / _STEPS)[:, None]
            if GATED:
                gate, up = total.reshape([_STRIP // 16, 2, 8, _ROWS]).permute([0, 2, 3, 1]).split()
                gated = (gate / (1.0 + gl.exp(-gate)) * up).reshape([STORED, _ROWS])
                _store(gated, y, column, first, end, y_stride)
            else:
                _store(total, y, column, first, end, y_stride)
        else:  # rows of none
            ANY: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [4, 1], [0, 1])
            _store(gl.zeros([STORED, _ROWS], gl.float32, layout=ANY), y, column, first, end, y_stride)


@gluon.jit
def _linear_kernel(
    x, codes, scales, y, table, experts, steps, out, columns, programs, y_stride,
    STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """y[row, column] = sum of x[row, i] * codes[expert, column, i], times the column's scale; see `kernels.linear`."""
    x_buffer = gl.allocate_shared_memory(gl.bfloat16, [STAGES, _ROWS, _INNER], x.layout)
    STRIPS: gl.constexpr = [STAGES * 2] + codes.block_shape  # noqa: RUF005  # Gluon has no other way to write it
    codes_buffer = gl.allocate_shared_memory(gl.int16, STRIPS, codes.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_multiply, (scales, y, table, full, empty, x_buffer, codes_buffer, experts, steps, out, columns, programs,
                     y_stride, 0, STAGES, GATED)),
        (_multiply, (scales, y, table, full, empty, x_buffer, codes_buffer, experts, steps, out, columns, programs,
                     y_stride, 1, STAGES, GATED)),
        (_fetch, (x, codes, table, full, empty, x_buffer, codes_buffer, experts, steps, out, columns, programs,
                  STAGES, GATED)),
    ], [4, 1], [232, 40])  # fmt: skip


# --- product ----------------------------------------------------------------------------------------------------------


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    ends: torch.Tensor,
    *,
    gated: bool,
    stages: int = _STAGES,
) -> torch.Tensor:
    """What `kernels.linear` gives for rows in bf16, if `hopper.is_usable`, and no `tokens`.

    Nothing waits for the device: a small kernel writes down where tiles are, as many as there can be.
    """
    experts, out, inner = codes.shape
    rows, columns = len(x), out // 2 if gated else out
    most = rows // _ROWS.value + min(rows, experts) + 1
    table = torch.empty(1 + 3 * most, device=x.device, dtype=torch.int32)
    _table_kernel[(most,)](ends, table, rows, experts, EXPERTS=triton.next_power_of_2(experts), ROWS=_ROWS.value)
    pairs = inner // 2
    if gated:
        shape, block = [experts, columns // 8, 2, 8, pairs], [1, 4, 2, 8, 32]
        strides = [out * pairs, 8 * pairs, columns * pairs, pairs, 1]
    else:
        shape, block, strides = [experts * out, pairs], [64, 32], [pairs, 1]
    y = x.new_empty(rows, columns)
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    _linear_kernel[(programs,)](
        TensorDescriptor(x, [rows, inner], [inner, 1], [256, 64], gl.NVMMASharedLayout(128, 16, rank=2)),
        TensorDescriptor(codes.view(torch.int16), shape, strides, block, gl.NVMMASharedLayout(64, 16, rank=len(shape))),
        scales, y, table, experts, inner // 64, out, columns, programs, columns,
        STAGES=stages, GATED=gated, num_warps=4,
    )  # fmt: skip
    return y
