"""Off-target exponentials: E = exp(z - o) with z = H W' + b, zero at the targets, with row sums and row maxima.

With o = z_y, the row sum s of E is the off-target mass of the sample: cross-entropy is log1p(s), and no two large
numbers are ever subtracted. The logits are never stored. The same kernel with another offset is the fallback for rows
whose E overflows: it is launched always, and does nothing unless its device flag is set.
"""

import triton
import triton.language as tl

from .launch import Launch, check_written, descriptor, laid_out, on_device
from .primitives import add_logits, corner, mask_targets, round_to


@triton.jit
def off_target_kernel(
    H, W, bias, offset, labels, flag, E, statistics, rows, classes, depth, stride,
    TARGETS: tl.constexpr, BIAS: tl.constexpr, FLAG: tl.constexpr, SINGLE: tl.constexpr, PASSES: tl.constexpr,
    TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    halves: tl.constexpr = 1 if PASSES == 1 else 2
    width = stride // halves
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    tiles = down * across
    if FLAG:
        tiles *= tl.load(flag)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_row, tile_column = corner(tile, down, across, GROUP)
        row, column = tile_row * BLOCK_M, tile_column * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        z = add_logits(z, H, W, row, column, rows, classes, depth, PASSES, TMA, BLOCK_M, BLOCK_N, BLOCK_K)
        r, c = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
        if BIAS:
            z += tl.load(bias + c, mask=c < classes, other=0.0).to(tl.float32)[None, :]
        # Rows past `classes` read zeros, which would count as logits: mask before the exponential.
        z = tl.where(c[None, :] < classes, z, float("-inf"))
        z = mask_targets(z, labels, r, c, rows, TARGETS)
        slot = statistics + tile_column.to(tl.int64) * rows + r
        plane = across.to(tl.int64) * rows
        tl.store(slot + 2 * plane, tl.max(z, 1), mask=r < rows)
        e = tl.exp(z - tl.load(offset + r, mask=r < rows, other=0.0)[:, None])
        tl.store(slot, tl.sum(e, 1), mask=r < rows)
        high = round_to(e, SINGLE)
        kept = high.to(tl.float32)
        target = E if TMA else E + r.to(tl.int64)[:, None] * stride + c[None, :]
        inside = (r[:, None] < rows) & (c[None, :] < width)
        if TMA:
            E.store([row, column], high)
        else:
            tl.store(target, high, mask=inside)
        if PASSES == 3:
            low = round_to(e - kept, SINGLE)
            kept += low.to(tl.float32)
            if TMA:
                E.store([row, column + width], low)
            else:
                tl.store(target + width, low, mask=inside)
        tl.store(slot + plane, tl.sum(kept, 1), mask=r < rows)


def kernel_name(passes, targets, size):
    """The row of the tile table: the plain case is one bf16 half of E and one target."""
    return "off_target" if passes == 1 and targets == 1 and size == 2 else "off_target_wide"


@on_device
def off_target(H, W, bias, offset, labels, E, *, passes, classes, flag=None, into=None, launch=None):
    """Fill E (rows, stride) and return statistics (3, tiles, rows): sums of E, sums of rounded E, maxima of z.

    Args:
        H, W: prepared operands (rows, halves * depth) and (classes, halves * depth), see `operands`.
        bias: (classes,) or None.
        offset: (rows,) fp32, the o of every row.
        labels: (rows, T) int32 in [0, classes), padded with -1; validated by the caller.
        E: (rows, halves * width) bfloat16 or float32, width >= classes: both halves if `passes` is 3.
        flag: int32 device scalar, 0 or 1: with 0 the launch writes nothing.
        into: what another launch on the same operands returned, to be written again.
    """
    check_written(E=E)
    H, W, bias, offset, labels = laid_out(H, W, bias, offset, labels)
    rows, depth = H.shape[0], H.shape[1] // (1 if passes == 1 else 2)
    launch = launch or Launch.of(kernel_name(passes, labels.shape[1], E.element_size()), H, passes)
    tile = launch.tile
    width = E.shape[1] // (1 if passes == 1 else 2)
    across = triton.cdiv(width, tile.columns)
    statistics = offset.new_empty((3, across, rows)) if into is None else into
    operands = (H, W, E)
    if tile.tma:
        blocks = ((tile.rows, tile.depth), (tile.columns, tile.depth), (tile.rows, tile.columns))
        operands = [descriptor(x, block) for x, block in zip(operands, blocks, strict=True)]
    off_target_kernel[launch.grid(triton.cdiv(rows, tile.rows) * across)](
        operands[0], operands[1], bias if bias is not None else offset, offset, labels,
        flag if flag is not None else labels, operands[2], statistics, rows, classes, depth, E.shape[1],
        TARGETS=labels.shape[1], BIAS=bias is not None, FLAG=flag is not None, SINGLE=E.element_size() == 4,
        PASSES=passes, **launch.options(),
    )  # fmt: skip
    return statistics
