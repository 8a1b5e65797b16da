"""Off-target exponentials: E = exp(z - o) with z = H W' + b, zero at the targets, with row sums and
row maxima.

With o = z_y, the row sum s of E is the off-target mass of the sample: cross-entropy is log1p(s),
and no two large numbers are ever subtracted. The logits are never stored. The same kernel with
another offset is the fallback for rows whose E overflows: it is launched always, and does nothing
unless its device flag is set.

Decisions

2026-11-25. Targets are masked in a loop over the logits themselves. Unrolled comparisons with up to
32 targets and a tile of booleans spilled on every architecture; the gate builds 1 and 32 targets. A
kernel used alone lays strided operands out, refuses strided outputs, and runs on its operands'
device.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import Launch, ceil_div, check_written, descriptor, head_of, laid_out, on_device
from .primitives import (
    Block,
    Head,
    add_logits,
    corner,
    exponential,
    halves_of,
    mask_target,
    mask_targets,
    round_to,
    store_sums,
)


class Stored(NamedTuple):
    """Where E goes: (rows, stride), both halves `width` apart with 3 PASSES; SINGLE: in tf32."""

    E: tl.tensor
    stride: tl.tensor
    width: tl.tensor
    SINGLE: tl.constexpr
    PASSES: tl.constexpr
    TMA: tl.constexpr


@triton.jit
def masked_logits(z, head, label, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """z with its bias, and -inf at targets and beyond the classes. label (HEIGHT,): the targets
    where each row has one.
    """
    r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    if head.BIAS:
        z += tl.load(head.bias + c, mask=c < head.classes, other=0.0).to(tl.float32)[None, :]
    # Rows past `classes` read zeros, which would count as logits. Most tiles hold neither those nor
    # a target.
    if column + WIDTH > head.classes:
        z = tl.where(c[None, :] < head.classes, z, float("-inf"))
    if head.TARGETS == 1:
        if tl.max(((label >= column) & (label < column + WIDTH)).to(tl.int32), 0) == 1:
            z = mask_target(z, label, c)
    else:
        z = mask_targets(z, head.labels, r, c, head.rows, head.TARGETS)
    return z


@triton.jit
def exponentials(
    z, head, stored, shift, label, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr
):
    """Store E of the tile z at (row, column); its row maxima, sums, and sums of rounded E. shift:
    its rows' offsets.
    """
    TMA: tl.constexpr = stored.TMA
    z = masked_logits(z, head, label, row, column, HEIGHT, WIDTH)
    r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    peak = tl.max(z, 1)
    e = exponential(z, shift[:, None], not stored.SINGLE and stored.PASSES == 1)
    high = round_to(e, stored.SINGLE)
    kept = high.to(tl.float32)
    target = stored.E if TMA else stored.E + r.to(tl.int64)[:, None] * stored.stride + c[None, :]
    inside = (r[:, None] < head.rows) & (c[None, :] < stored.width)
    if TMA:
        stored.E.store([row, column], high)
    else:
        tl.store(target, high, mask=inside)
    if stored.PASSES == 3:
        low = round_to(e - kept, stored.SINGLE)
        kept += low.to(tl.float32)
        if TMA:
            stored.E.store([row, column + stored.width], low)
        else:
            tl.store(target + stored.width, low, mask=inside)
    return peak, tl.sum(e, 1), tl.sum(kept, 1)


@triton.jit
def exponentials_of_parts(
    z,
    head,
    stored,
    shift,
    label,
    row,
    column,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
):
    """`exponentials` of a tile in PARTS, a power of two: fewer registers, and less shared memory on
    the way out.
    """
    if PARTS > 1:
        half: tl.constexpr = WIDTH // 2
        left, right = halves_of(z, HEIGHT, WIDTH)
        peak, mass, kept = exponentials_of_parts(
            left, head, stored, shift, label, row, column, HEIGHT, half, PARTS // 2
        )
        peak_right, mass_right, kept_right = exponentials_of_parts(
            right, head, stored, shift, label, row, column + half, HEIGHT, half, PARTS // 2
        )
        peak, mass, kept = tl.maximum(peak, peak_right), mass + mass_right, kept + kept_right
    else:
        peak, mass, kept = exponentials(z, head, stored, shift, label, row, column, HEIGHT, WIDTH)
    return peak, mass, kept


@triton.jit
def off_target_kernel(
    H,
    W,
    E,
    head: Head,
    offset,
    flag,
    statistics,
    depth,
    stride,
    first,
    count,
    block: Block,
    FLAG: tl.constexpr,
    PART: tl.constexpr,
    SINGLE: tl.constexpr,
    PASSES: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPLIT: tl.constexpr,
):
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    halves: tl.constexpr = 1 if PASSES == 1 else 2
    rows, width = head.rows, stride // halves
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(width, WIDTH)
    walked = count if PART else across
    tiles = down * walked
    if FLAG:
        tiles *= tl.load(flag)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_row, tile_column = corner(tile, down, walked, block.GROUP)
        if PART:
            tile_column += first
        row, column = tile_row * HEIGHT, tile_column * WIDTH
        r = row + tl.arange(0, HEIGHT)
        # Before the product, behind which they arrive.
        shift = tl.load(offset + r, mask=r < rows, other=0.0)
        label = (
            tl.load(head.labels + r.to(tl.int64) * head.TARGETS, mask=r < rows, other=-1)
            if head.TARGETS == 1
            else r
        )
        z = tl.zeros((HEIGHT, WIDTH), tl.float32)
        z = add_logits(z, H, W, row, column, rows, head.classes, depth, block, PASSES)
        peak, mass, kept = exponentials_of_parts(
            z,
            head,
            Stored(E, stride, width, SINGLE, PASSES, block.TMA),
            shift,
            label,
            row,
            column,
            HEIGHT,
            WIDTH,
            SPLIT,
        )
        store_sums(statistics, tile_column, across, r, rows, rows, mass, kept, peak)


DEEP = 2048  # columns of features from which the product hides the epilogue


def kernel_name(passes, targets, size, depth, biased):
    """The row of the tile table: the plain case is one bf16 half of E and one target."""
    if passes != 1 or targets != 1 or size != 2:
        return "off_target_wide"
    return f"off_target{'_deep' if depth >= DEEP else ''}{'_biased' if biased else ''}"


def tiles_of(part, columns, across, width):
    """(first, number) of the tiles of `columns` that a range of E's `width` columns is; all
    `across` without one.
    """
    if part is None:
        return 0, across
    first, end = part
    if first % columns or (end % columns and end != width) or not 0 <= first < end <= width:
        raise ValueError(f"part={part}: must be whole tiles of {columns} of the {width} columns")
    return first // columns, ceil_div(end - first, columns)


@on_device
def off_target(
    H,
    W,
    bias,
    offset,
    labels,
    E,
    *,
    passes,
    classes,
    flag=None,
    into=None,
    part=None,
    launch=None,
):
    """Fill E (rows, stride) and return statistics (3, tiles, rows): sums of E, sums of rounded E,
    maxima of z.

    Args:
        H, W: prepared operands (rows, halves * depth) and (classes, halves * depth), see
            `operands`.
        bias: (classes,) or None.
        offset: (rows,) fp32, the o of every row.
        labels: (rows, T) int32 in [0, classes), padded with -1; validated by the caller.
        E: (rows, halves * width) bfloat16 or float32, width >= classes: both halves if `passes` is
            3.
        flag: int32 device scalar, 0 or 1: with 0 the launch writes nothing.
        into: what another launch on the same operands returned, to be written again.
        part: (first, after the last) class, multiples of a tile's columns but for the end of E: no
            other columns of E, nor their statistics, are written.
    """
    check_written(E=E)
    H, W, bias, offset, labels = laid_out(H, W, bias, offset, labels)
    rows, depth = H.shape[0], H.shape[1] // (1 if passes == 1 else 2)
    launch = launch or Launch.of(
        kernel_name(passes, labels.shape[1], E.element_size(), depth, bias is not None), H, passes
    )
    tile = launch.tile
    width = E.shape[1] // (1 if passes == 1 else 2)
    across = ceil_div(width, tile.columns)
    statistics = offset.new_empty((3, across, rows)) if into is None else into
    first, count = tiles_of(part, tile.columns, across, width)
    operands = (H, W, E)
    if tile.tma:
        blocks = (
            (tile.rows, tile.depth),
            (tile.columns, tile.depth),
            (tile.rows, tile.columns // tile.split),
        )
        operands = [descriptor(x, block) for x, block in zip(operands, blocks, strict=True)]
    off_target_kernel[launch.grid(ceil_div(rows, tile.rows) * count)](
        *operands,
        head_of(bias, labels, offset, classes),
        offset,
        flag if flag is not None else labels,
        statistics,
        depth,
        E.shape[1],
        first,
        count,
        FLAG=flag is not None,
        PART=part is not None,
        SINGLE=E.element_size() == 4,
        PASSES=passes,
        FLATTEN=tile.flatten,
        SPLIT=tile.split,
        **launch.options(),
    )
    return statistics
