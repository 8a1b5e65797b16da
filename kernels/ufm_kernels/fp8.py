"""Mode fp8: logits in bfloat16, E in e4m3, both gradient products by the fp8 tensor cores. sm_90
only, by name only.

An exponential turns a logit's absolute error into a relative one, so fp8 cannot carry logits. It
can carry E: roundings of 2^-4 are independent from entry to entry and the target stands outside, so
the errors of a sum average. Each operand has a scale for every row and every 128 terms along the
contraction, and what 128 terms sum to is multiplied by its scales and added in fp32: the tensor
cores keep 14 bits of such a sum. They take both operands along the depth only, so the epilogue
writes E for dH and its transpose for dW, 1 byte each: the bytes of one bfloat16 E, which takes
their place where a chunk falls back.

The normwise error of dH and dW is about 0.04 sqrt(sum_k E_k^2) / sum_k E_k, root mean square over
rows (float64 emulation, K from 1,000 to 16,384, logits of deviation 0.5 to 3). It falls out of the
sweep; a chunk beyond a bound takes bfloat16 products, as the device decides. Untimed; by counting,
(65536, 65536, 1024) takes 27 ms where bfloat16 takes 43.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import Launch, ceil_div, check_written, descriptor, head_of, laid_out, on_device
from .primitives import (
    INTERPRETED,
    Block,
    Head,
    add_logits,
    corner,
    exponential,
    halves_of,
    load_tile,
    mask_target,
    multiply,
    tile_at,
)

TERMS = 128  # along the contraction to a scale
LARGEST = tl.constexpr(448.0)  # of e4m3
ERROR = 0.04  # normwise error of a product to the root of a row's sum of squares over its sum


@triton.jit
def scale_of(top):
    """What takes `top` to the largest number of e4m3; 1 where all is zero."""
    return tl.where(top > 0, top / LARGEST, 1.0)


@triton.jit
def lift_of(offset, target, level):
    """What a row of the transpose is multiplied by, for rows that share a scale must be of one
    size.

    e^(target's logit - mean logit) makes them so, whatever the target's logit is; a row relative to
    its maximum is already.
    """
    lift = tl.exp(tl.minimum(tl.maximum(target - level, -80.0), 80.0))
    return tl.where(offset == target, lift, 1.0)


@triton.jit
def e4m3(x):
    """x >= 0 rounded to nearest: a multiple of 2^-9 below 2^-6, else three bits behind the
    first.
    """
    if INTERPRETED:  # which would truncate what is small
        bits = x.to(tl.uint32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000).to(tl.float32, bitcast=True)
        x = tl.where(x < 0.015625, (x + 24576.0) - 24576.0, normal)
    return x.to(tl.float8e4nv)


class Copy(NamedTuple):
    """A rounded copy of E: (rows, stride) e4m3, or turned, and its scales, a row of them for each
    tile.
    """

    E: tl.tensor
    scale: tl.tensor
    stride: tl.tensor


@triton.jit
def store_copy(copy, q, scales, tile, row, column, rows, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of a copy at (row, column), and its scales, those of tile number ``tile`` across."""
    r = row + tl.arange(0, HEIGHT)
    tl.store(copy.scale + tile.to(tl.int64) * rows + r, scales, mask=r < rows)
    place, inside = tile_at(copy.E, row, column, rows, copy.stride, copy.stride, HEIGHT, WIDTH)
    tl.store(place, q, mask=inside)


@triton.jit
def exponentials_kernel(
    H,
    W,
    head: Head,
    offset,
    target,
    level,
    flag,
    rowwise: Copy,
    turned: Copy,
    statistics,
    depth,
    block: Block,
    FLAG: tl.constexpr,
):
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    rows, classes = head.rows, head.classes
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(classes, WIDTH)
    tiles = down * across
    if FLAG:
        tiles *= tl.load(flag)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_row, tile_column = corner(tile, down, across, block.GROUP)
        row, column = tile_row * HEIGHT, tile_column * WIDTH
        r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        z = tl.zeros((HEIGHT, WIDTH), tl.float32)
        z = add_logits(z, H, W, row, column, rows, classes, depth, block, 1)
        if head.BIAS:
            z += tl.load(head.bias + c, mask=c < classes, other=0.0).to(tl.float32)[None, :]
        z = tl.where((r < rows)[:, None] & (c < classes)[None, :], z, float("-inf"))
        z = mask_target(z, tl.load(head.labels + r, mask=r < rows, other=-1), c)
        slot = statistics + tile_column.to(tl.int64) * rows + r
        plane = across.to(tl.int64) * rows
        tl.store(slot + 2 * plane, tl.max(z, 1), mask=r < rows)
        shift = tl.load(offset + r, mask=r < rows, other=0.0)
        e = exponential(z, shift[:, None], True)
        tl.store(slot, tl.sum(e, 1), mask=r < rows)
        tl.store(slot + 3 * plane, tl.sum(e * e, 1), mask=r < rows)
        of_rows = scale_of(tl.max(e, 1))
        q = e4m3(e / of_rows[:, None])
        tl.store(slot + plane, tl.sum(q.to(tl.float32), 1) * of_rows, mask=r < rows)
        store_copy(rowwise, q, of_rows, tile_column, row, column, rows, HEIGHT, WIDTH)
        own = tl.load(target + r, mask=r < rows, other=0.0)
        lift = lift_of(shift, own, tl.load(level + r, mask=r < rows, other=0.0))
        e *= lift[:, None]
        of_columns = scale_of(tl.max(e, 0))
        q = e4m3(e / of_columns[None, :])
        tl.store(
            slot + 4 * plane,
            tl.sum(q.to(tl.float32) * of_columns[None, :], 1) / lift,
            mask=r < rows,
        )
        store_copy(turned, q.T, of_columns, tile_row, column, row, classes, WIDTH, HEIGHT)


@triton.jit
def store(
    total,
    out,
    row,
    column,
    rows,
    columns,
    stride,
    ADD: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A part of a tile is written, or added to what stands there."""
    place, inside = tile_at(out, row, column, rows, columns, stride, HEIGHT, WIDTH)
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def product_kernel(
    A,
    B,
    scale_a,
    scale_b,
    flag,
    out,
    rows,
    columns,
    depth,
    stride_a,
    stride_b,
    stride_out,
    block: Block,
    ADD: tl.constexpr,
):
    """out = or += A B', A (rows, depth) and B (columns, depth) with scales (depth / 128, rows) and
    (depth / 128, columns).
    """
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    SPAN: tl.constexpr = block.DEPTH
    TMA: tl.constexpr = block.TMA
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(columns, WIDTH)
    tiles = down * across * (1 - tl.load(flag))
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_row, tile_column = corner(tile, down, across, block.GROUP)
        row, column = tile_row * HEIGHT, tile_column * WIDTH
        r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        total = tl.zeros((HEIGHT, WIDTH), tl.float32)
        for step in range(tl.cdiv(depth, SPAN)):
            k = tl.cast(step, tl.int32) * SPAN
            a = load_tile(A, row, k, 0, rows, depth, stride_a, HEIGHT, SPAN, TMA)
            b = load_tile(B, column, k, 0, columns, depth, stride_b, WIDTH, SPAN, TMA)
            part = multiply(a, b.T, tl.zeros((HEIGHT, WIDTH), tl.float32))
            of_rows = tl.load(
                scale_a + tl.cast(step, tl.int64) * rows + r, mask=r < rows, other=0.0
            )
            of_columns = tl.load(
                scale_b + tl.cast(step, tl.int64) * columns + c, mask=c < columns, other=0.0
            )
            total += part * of_rows[:, None] * of_columns[None, :]
        half: tl.constexpr = WIDTH // 2
        left, right = halves_of(total, HEIGHT, WIDTH)
        store(left, out, row, column, rows, columns, stride_out, ADD, HEIGHT, half)
        store(right, out, row, column + half, rows, columns, stride_out, ADD, HEIGHT, half)


@on_device
def exponentials(
    H,
    W,
    bias,
    offset,
    target,
    level,
    labels,
    E,
    T,
    scale,
    scale_t,
    *,
    flag=None,
    into=None,
    launch=None,
):
    """Fill E (rows, stride) and T (classes, stride_t), e4m3, and their scales; return statistics
    (5, tiles, rows).

    The planes: sums of E, sums of E as the first copy rounds it, maxima of z, sums of squares, sums
    as the second rounds it. target and level (rows,) fp32: the targets' logits and the mean logits;
    T holds E times `lift_of` them. Scales are fp32, (tiles, rows) and (row tiles, classes).
    Otherwise as `off_target.off_target`, with one label a row.
    """
    check_written(E=E, T=T, scale=scale, scale_t=scale_t)
    H, W, bias, offset, target, level, labels = laid_out(H, W, bias, offset, target, level, labels)
    rows, classes = len(H), len(W)
    launch = launch or Launch.of("fp8_exponentials", H)
    tile = launch.tile
    across = ceil_div(classes, tile.columns)
    statistics = offset.new_empty((5, across, rows)) if into is None else into
    h, w = H, W
    if tile.tma:
        h, w = descriptor(H, (tile.rows, tile.depth)), descriptor(W, (tile.columns, tile.depth))
    exponentials_kernel[launch.grid(ceil_div(rows, tile.rows) * across)](
        h,
        w,
        head_of(bias, labels, offset, classes),
        offset,
        target,
        level,
        labels if flag is None else flag,
        Copy(E, scale, E.shape[1]),
        Copy(T, scale_t, T.shape[1]),
        statistics,
        H.shape[1],
        FLAG=flag is not None,
        **launch.options(),
    )
    return statistics


@on_device
def product(out, A, B, scale_a, scale_b, flag, *, add, launch=None):
    """out (rows, columns) fp32 = or, with `add`, += A B', unless the device's flag is 1; operands
    as `quantised` makes them.
    """
    check_written(out=out)
    launch = launch or Launch.of("fp8_product", A)
    tile = launch.tile
    a, b = A, B
    if tile.tma:
        a, b = descriptor(A, (tile.rows, tile.depth)), descriptor(B, (tile.columns, tile.depth))
    (rows, columns), depth = out.shape, A.shape[1]
    product_kernel[launch.grid(ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns))](
        a,
        b,
        scale_a,
        scale_b,
        flag,
        out,
        rows,
        columns,
        depth,
        A.stride(0),
        B.stride(0),
        out.stride(0),
        ADD=add,
        **launch.options(),
    )
