"""The two products of E with the parameters, with everything after the product in the epilogue.

    dH += factor * (E W) - sum_t coefficient_t w_(y_t)          rows: samples, depth: classes
    dW += E' X,  X = factor * H                                 rows: classes, depth: the samples of the chunk

With a `Step` the epilogue that completes a gradient also takes the momentum step, while its numbers are in registers.

One kernel: the second takes E transposed and has neither factor nor targets. Each output element is read, added to and
written by one program in one order, so gradients are the same bits from run to run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import Launch, ceil_div, check_written, descriptor, laid_out, on_device
from .primitives import contract, corner, halves_of, tile_at


@triton.jit
def finish(
    total, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column, rows, columns,
    classes, stride, FACTOR: tl.constexpr, TARGETS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr = True,
):  # fmt: skip
    """The epilogue of one block of the product: row factor, target term, accumulation, and the step if asked for."""
    r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    if FACTOR:
        total *= tl.load(factor + r, mask=r < rows, other=0.0)[:, None]
    for t in tl.range(TARGETS, num_stages=1):
        entry = r.to(tl.int64) * TARGETS + t
        label = tl.load(labels + entry, mask=r < rows, other=-1)
        # A label that is no class must not read memory; its coefficient is NaN.
        weight = tl.load(coefficient + entry, mask=label >= 0, other=0.0)[:, None]
        point = points + label.to(tl.int64)[:, None] * stride + c[None, :]
        known = ((label >= 0) & (label < classes))[:, None] & (c < columns)[None, :]
        total -= weight * tl.load(point, mask=known, other=0.0).to(tl.float32)
        if PAIRS:
            total -= weight * tl.load(point + stride // 2, mask=known, other=0.0).to(tl.float32)
    place, inside = tile_at(out, row, column, rows, columns, columns, HEIGHT, WIDTH)
    if ADD:
        total += tl.load(place, mask=inside, other=0.0)
    if STEP:
        here, _ = tile_at(current, row, column, rows, columns, columns, HEIGHT, WIDTH)
        point = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(settings) * point
        moving, _ = tile_at(velocity, row, column, rows, columns, columns, HEIGHT, WIDTH)
        speed = tl.load(settings + 1) * tl.load(moving, mask=inside, other=0.0) + total
        tl.store(moving, speed, mask=inside)
        there, _ = tile_at(updated, row, column, rows, columns, columns, HEIGHT, WIDTH)
        tl.store(there, point - tl.load(settings + 2) * speed, mask=inside)
    tl.store(place, total, mask=inside)


@triton.jit
def finish_halves(
    total, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column, rows, columns,
    classes, stride, FACTOR: tl.constexpr, TARGETS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`finish` of the left and then of the right half of a block."""
    half: tl.constexpr = WIDTH // 2
    left, right = halves_of(total, HEIGHT, WIDTH)
    finish(
        left, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column, rows, columns,
        classes, stride, FACTOR, TARGETS, PAIRS, STEP, HEIGHT, half,
    )  # fmt: skip
    finish(
        right, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column + half, rows,
        columns, classes, stride, FACTOR, TARGETS, PAIRS, STEP, HEIGHT, half,
    )  # fmt: skip


@triton.jit
def product_kernel(
    A, B, out, factor, coefficient, labels, points, current, velocity, updated, settings,
    rows, columns, classes, depth, stride_a, stride_b, stride_points,
    TRANSPOSED: tl.constexpr, DOWN: tl.constexpr, FACTOR: tl.constexpr, TARGETS: tl.constexpr, PAIRS: tl.constexpr,
    PASSES: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=FLATTEN):
        tile_row, tile_column = corner(tile, down, across, GROUP)
        row, column = tile_row * BLOCK_M, tile_column * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        total = contract(
            total, A, B, row, column, rows, columns, depth, stride_a, stride_b, TRANSPOSED, DOWN, PASSES, TMA,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # A part of a tile at a time: the accumulator, what is added to it and the addresses do not fit the registers at once.
        if BLOCK_N > 128:
            half: tl.constexpr = BLOCK_N // 2
            left, right = halves_of(total, BLOCK_M, BLOCK_N)
            finish_halves(
                left, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column,
                rows, columns, classes, stride_points, FACTOR, TARGETS, PAIRS, STEP, BLOCK_M, half,
            )  # fmt: skip
            finish_halves(
                right, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column + half,
                rows, columns, classes, stride_points, FACTOR, TARGETS, PAIRS, STEP, BLOCK_M, half,
            )  # fmt: skip
        else:
            finish_halves(
                total, out, factor, coefficient, labels, points, current, velocity, updated, settings, row, column,
                rows, columns, classes, stride_points, FACTOR, TARGETS, PAIRS, STEP, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def epilogue_kernel(
    product, out, factor, coefficient, labels, points, rows, columns, classes, stride,
    TARGETS: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What `product_kernel` does with a block of its product, for a block of a product that is in memory."""
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    place, inside = tile_at(product, row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    total = tl.load(place, mask=inside, other=0.0)
    finish(
        total, out, factor, coefficient, labels, points, out, out, out, out, row, column, rows, columns, classes, stride,
        True, TARGETS, False, False, BLOCK_M, BLOCK_N, ADD,
    )  # fmt: skip


@triton.jit
def weighted_sums_kernel(
    E, weight, out, rows, classes, stride,
    TRANSPOSED: tl.constexpr, HALVES: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """out_k += sum_i weight_i E_ik over a block of classes, or out_i += sum_k weight_k E_ik over a block of rows."""
    first = tl.program_id(0) * BLOCK
    kept = first + tl.arange(0, BLOCK)
    if TRANSPOSED:
        length, limit = classes, rows
    else:
        length, limit = rows, classes
    total = tl.zeros((BLOCK,), tl.float64)  # of up to millions of terms that may all be equal
    for begin in range(0, limit, SPAN):
        summed = begin + tl.arange(0, SPAN)
        w = tl.load(weight + summed, mask=summed < limit, other=0.0)
        inside = (summed < limit)[:, None] & (kept < length)[None, :]
        if TRANSPOSED:
            place = E + summed.to(tl.int64)[:, None] * stride + kept[None, :]
        else:
            place = E + kept.to(tl.int64)[None, :] * stride + summed[:, None]
        e = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if HALVES == 2:
            e += tl.load(place + stride // 2, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(w[:, None] * e, 0).to(tl.float64)
    tl.store(out + kept, total + tl.load(out + kept, mask=kept < length, other=0.0), mask=kept < length)


@on_device
def add_weighted_sums(out, E, weight, *, passes, classes, transposed=True):
    """out (classes,) += E' weight if `transposed`, else out (rows,) += E weight; out fp32 or fp64, E of `off_target`."""
    check_written(out=out)
    E, weight = laid_out(E, weight)
    block, span = (64, 64) if transposed else (16, 256)
    weighted_sums_kernel[(ceil_div(out.shape[0], block),)](
        E, weight, out, E.shape[0], classes, E.stride(0), TRANSPOSED=transposed, HALVES=1 if passes == 1 else 2,
        BLOCK=block, SPAN=span, num_warps=4, num_stages=2,
    )  # fmt: skip


@on_device
def add_finished(out, product, factor, coefficient, labels, points, *, add=True):
    """out += factor * product - sum_t coefficient_t points[labels_t], the epilogue of `add_product` for a library's product.

    Not add: out, which may be the product itself, is written.

    Args:
        out, product: (rows, columns) contiguous fp32. factor: (rows,) fp32. coefficient: (rows, T) fp32.
        labels: (rows, T) int32, padded with -1. points: (classes, at least columns), as the logits' operand.
    """
    check_written(out=out)
    product, factor, coefficient, labels, points = laid_out(product, factor, coefficient, labels, points)
    rows, columns = out.shape
    height, span = 16, 128
    epilogue_kernel[(ceil_div(rows, height), ceil_div(columns, span))](
        product, out, factor, coefficient, labels, points, rows, columns, len(points), points.stride(0),
        TARGETS=labels.shape[1], ADD=add, BLOCK_M=height, BLOCK_N=span, num_warps=4, num_stages=2,
    )  # fmt: skip


class Step(NamedTuple):
    """A momentum step: g += penalty x; v = momentum v + g; y = x - rate v, with x, v, y of the gradient's shape.

    current x: any float dtype; velocity v: fp32, in place; updated y: in x's dtype, another buffer than x, which other
    tiles and later products still read. settings: fp32 (3,) = penalty, momentum, rate on the device: no synchronisation.
    """

    current: Any
    velocity: Any
    updated: Any
    settings: Any

    def rows(self, part):
        """The step of some of the rows."""
        return Step(self.current[part], self.velocity[part], self.updated[part], self.settings)


def kernel_name(transposed, targets, step):
    """The row of the tile table."""
    if step:
        return "step"
    return "transposed" if transposed else "product" if targets <= 1 else "product_wide"


@on_device
def add_product(
    out, A, B, *, passes, depth, transposed=False, down=True, factor=None, coefficient=None, labels=None, points=None,
    exact=False, step=None, launch=None,
):  # fmt: skip
    """out += factor * (A B) - sum_t coefficient_t points[labels_t], with A transposed first if `transposed`.

    Args:
        out: (rows, columns) contiguous fp32.
        A: (rows, halves * depth), or (depth, halves * rows) if transposed; both halves if `passes` is 3.
        B: (depth, halves * columns), padded as the operands are, or the operand (columns, halves * depth) of its transpose
            where not `down`: tensor cores read float32 from there without moving it. points: (depth, halves * columns), or
            (classes, columns) of any float dtype if `exact`.
        depth: the length of the contraction, at most the rows of B: padding of A beyond it is not read as data.
        step: a Step taken with the finished `out`, which then holds the penalty's gradient too; or None.
        factor: (rows,) fp32 or None. coefficient: (rows, T) fp32 and labels: (rows, T) int32 padded with -1, or None.
    """
    check_written(out=out)
    if step is not None:
        check_written(current=step.current, velocity=step.velocity, updated=step.updated)
    A, B, factor, coefficient, labels, points = laid_out(A, B, factor, coefficient, labels, points)
    rows, columns = out.shape
    targets = 0 if labels is None else labels.shape[1]
    launch = launch or Launch.of(kernel_name(transposed, targets, step is not None), A, passes)
    tile = launch.tile
    if not tile.tma:  # offsets inside a tile are 32-bit
        for name, matrix, height in (("A", A, max(tile.rows, tile.depth)), ("B", B, max(tile.columns, tile.depth))):
            if height * matrix.stride(0) >= 2**31:
                long = f"rows of {matrix.stride(0)} entries are too long for this device's tiles"
                raise ValueError(f"{name}: {long}; use fewer classes or halves")
    a, b = A, B
    if tile.tma:
        a = descriptor(A, (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth))
        b = descriptor(B, (tile.depth, tile.columns) if down else (tile.columns, tile.depth))
    unused = out
    current, velocity, updated, settings = step or (unused, unused, unused, unused)
    product_kernel[launch.grid(ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns))](
        a, b, out, unused if factor is None else factor, unused if coefficient is None else coefficient,
        unused if labels is None else labels, unused if points is None else points,
        current, velocity, updated, settings, rows, columns, len(points) if exact else depth, depth, A.stride(0),
        B.stride(0), B.stride(0) if points is None else points.stride(0), TRANSPOSED=transposed, DOWN=down,
        FACTOR=factor is not None, TARGETS=targets, PAIRS=passes == 3 and not exact, PASSES=passes,
        STEP=step is not None, FLATTEN=tile.flatten, **launch.options(),
    )  # fmt: skip
