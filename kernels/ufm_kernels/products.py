"""The two products of E with the parameters, with everything after the product in the epilogue.

    dH += factor * (E W) - sum_t coefficient_t w_(y_t)     rows: samples, depth: classes
    dW += E' X,  X = factor * H                            rows: classes, depth: the chunk's samples

One kernel: the second takes E transposed and has neither factor nor targets. Each output element is
read, added to and written by one program in one order, so gradients are the same bits from run to
run.

Decisions

2026-11-25. Products of pairs are summed outside the tensor cores. Those truncate where they add to
an accumulator. Emulated in the interpreter (truncation after every 16 terms), a chain of 8,192
terms errs by 6e-5 and a logit of 20 over d = 4,096 by 6e-4, far beyond what a pair is for. So a
step of the loop loads both halves of both operands, chains its three products from zero, the small
ones first, and adds their sum in fp32: 1e-6 and 1e-5. It also loads four tiles where three passes
in turn loaded six. The price is a second accumulator, hence smaller tiles in places
(`tiles.PAIRS`), and a wait for each block; untimed. The compiler would fold the addition back if it
were of one product: the gate checks that it did not.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import Launch, ceil_div, check_written, constants, descriptor, laid_out, on_device
from .primitives import Block, Operand, contract, corner, halves_of, tile_at


class Epilogue(NamedTuple):
    """What follows a product: out (rows, columns) + factor * product - sum_t coefficient_t
    points[labels_t].

    points (classes, stride) are pairs with PAIRS; not ADD: out is written.
    """

    out: tl.tensor
    factor: tl.tensor
    coefficient: tl.tensor
    labels: tl.tensor
    points: tl.tensor
    rows: tl.tensor
    columns: tl.tensor
    classes: tl.tensor
    stride: tl.tensor
    FACTOR: tl.constexpr
    TARGETS: tl.constexpr
    PAIRS: tl.constexpr
    ADD: tl.constexpr


@triton.jit
def finish(total, to, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The epilogue of one block of the product: row factor, target term and accumulation."""
    r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
    if to.FACTOR:
        total *= tl.load(to.factor + r, mask=r < to.rows, other=0.0)[:, None]
    for t in tl.range(to.TARGETS, num_stages=1):
        entry = r.to(tl.int64) * to.TARGETS + t
        label = tl.load(to.labels + entry, mask=r < to.rows, other=-1)
        # A label that is no class must not read memory; its coefficient is NaN.
        weight = tl.load(to.coefficient + entry, mask=label >= 0, other=0.0)[:, None]
        point = to.points + label.to(tl.int64)[:, None] * to.stride + c[None, :]
        known = ((label >= 0) & (label < to.classes))[:, None] & (c < to.columns)[None, :]
        total -= weight * tl.load(point, mask=known, other=0.0).to(tl.float32)
        if to.PAIRS:
            total -= weight * tl.load(point + to.stride // 2, mask=known, other=0.0).to(tl.float32)
    place, inside = tile_at(to.out, row, column, to.rows, to.columns, to.columns, HEIGHT, WIDTH)
    if to.ADD:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


@triton.jit
def finish_parts(
    total, to, row, column, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr
):
    """`finish` of a block in PARTS, a power of two, from left to right: what is added and its
    addresses take registers too.
    """
    if PARTS > 1:
        half: tl.constexpr = WIDTH // 2
        left, right = halves_of(total, HEIGHT, WIDTH)
        finish_parts(left, to, row, column, HEIGHT, half, PARTS // 2)
        finish_parts(right, to, row, column + half, HEIGHT, half, PARTS // 2)
    else:
        finish(total, to, row, column, HEIGHT, WIDTH)


@triton.jit
def product_kernel(
    A,
    B,
    to: Epilogue,
    flag,
    depth,
    stride_a,
    stride_b,
    block: Block,
    TRANSPOSED: tl.constexpr,
    DOWN: tl.constexpr,
    FLAG: tl.constexpr,
    PASSES: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    down, across = tl.cdiv(to.rows, HEIGHT), tl.cdiv(to.columns, WIDTH)
    tiles = down * across
    if FLAG:
        tiles *= tl.load(flag)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_row, tile_column = corner(tile, down, across, block.GROUP)
        row, column = tile_row * HEIGHT, tile_column * WIDTH
        total = contract(
            tl.zeros((HEIGHT, WIDTH), tl.float32),
            Operand(A, to.rows, stride_a, TRANSPOSED),
            Operand(B, to.columns, stride_b, DOWN),
            row,
            column,
            depth,
            block,
            PASSES,
        )
        finish_parts(total, to, row, column, HEIGHT, WIDTH, 4 if WIDTH > 128 else 2)


@triton.jit
def epilogue_kernel(product, to: Epilogue, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What `product_kernel` does with a block of its product, for a block of a product that is in
    memory.
    """
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    place, inside = tile_at(product, row, column, to.rows, to.columns, to.columns, BLOCK_M, BLOCK_N)
    total = tl.load(place, mask=inside, other=0.0)
    finish(total, to, row, column, BLOCK_M, BLOCK_N)


@triton.jit
def weighted_sums_kernel(
    E,
    weight,
    out,
    rows,
    classes,
    stride,
    TRANSPOSED: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """out_k += sum_i weight_i E_ik over a block of classes, or out_i += sum_k weight_k E_ik over a
    block of rows.
    """
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
    tl.store(
        out + kept, total + tl.load(out + kept, mask=kept < length, other=0.0), mask=kept < length
    )


@on_device
def add_weighted_sums(out, E, weight, *, passes, classes, transposed=True):
    """out (classes,) += E' weight if `transposed`, else out (rows,) += E weight; out fp32 or fp64,
    E of `off_target`.
    """
    check_written(out=out)
    E, weight = laid_out(E, weight)
    block, span = (64, 64) if transposed else (16, 256)
    weighted_sums_kernel[(ceil_div(out.shape[0], block),)](
        E,
        weight,
        out,
        E.shape[0],
        classes,
        E.stride(0),
        TRANSPOSED=transposed,
        HALVES=1 if passes == 1 else 2,
        BLOCK=block,
        SPAN=span,
        num_warps=4,
        num_stages=2,
    )


@on_device
def add_finished(out, product, factor, coefficient, labels, points, *, add=True):
    """out += factor * product - sum_t coefficient_t points[labels_t], the epilogue of `add_product`
    for a library's product.

    Not add: out, which may be the product itself, is written.

    Args:
        out, product: (rows, columns) contiguous fp32. factor: (rows,) fp32. coefficient: (rows, T)
            fp32.
        labels: (rows, T) int32, padded with -1. points: (classes, at least columns), as the logits'
            operand.
    """
    check_written(out=out)
    product, factor, coefficient, labels, points = laid_out(
        product, factor, coefficient, labels, points
    )
    rows, columns = out.shape
    height, span = 16, 128
    epilogue_kernel[(ceil_div(rows, height), ceil_div(columns, span))](
        product,
        Epilogue(
            out,
            factor,
            coefficient,
            labels,
            points,
            rows,
            columns,
            len(points),
            points.stride(0),
            *constants(True, labels.shape[1], False, add),
        ),
        BLOCK_M=height,
        BLOCK_N=span,
        num_warps=4,
        num_stages=2,
    )


def kernel_name(transposed, targets):
    """The row of the tile table."""
    return "transposed" if transposed else "product" if targets <= 1 else "product_wide"


@on_device
def add_product(
    out,
    A,
    B,
    *,
    passes,
    depth,
    transposed=False,
    down=True,
    factor=None,
    coefficient=None,
    labels=None,
    points=None,
    exact=False,
    flag=None,
    launch=None,
):
    """out += factor * (A B) - sum_t coefficient_t points[labels_t], with A transposed first if
    `transposed`.

    Args:
        out: (rows, columns) contiguous fp32.
        A: (rows, halves * depth), or (depth, halves * rows) if transposed; both halves if `passes`
            is 3.
        B: (depth, halves * columns), padded as the operands are, or the operand (columns, halves *
            depth) of its transpose where not `down`: tensor cores read float32 from there without
            moving it. points: (depth, halves * columns), or (classes, columns) of any float dtype
            if `exact`.
        depth: the length of the contraction, at most the rows of B: padding of A beyond it is not
            read as data.
        flag: int32 device scalar, 0 or 1: with 0 the launch does nothing; or None.
        factor: (rows,) fp32 or None. coefficient: (rows, T) fp32 and labels: (rows, T) int32 padded
            with -1, or None.
    """
    check_written(out=out)
    A, B, factor, coefficient, labels, points = laid_out(A, B, factor, coefficient, labels, points)
    rows, columns = out.shape
    targets = 0 if labels is None else labels.shape[1]
    launch = launch or Launch.of(kernel_name(transposed, targets), A, passes)
    tile = launch.tile
    if not tile.tma:  # offsets inside a tile are 32-bit
        for name, matrix, height in (
            ("A", A, max(tile.rows, tile.depth)),
            ("B", B, max(tile.columns, tile.depth)),
        ):
            if height * matrix.stride(0) >= 2**31:
                long = f"rows of {matrix.stride(0)} entries are too long for this device's tiles"
                raise ValueError(f"{name}: {long}; use fewer classes or halves")
    a, b = A, B
    if tile.tma:
        a = descriptor(A, (tile.depth, tile.rows) if transposed else (tile.rows, tile.depth))
        b = descriptor(B, (tile.depth, tile.columns) if down else (tile.columns, tile.depth))
    unused = out
    product_kernel[launch.grid(ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns))](
        a,
        b,
        Epilogue(
            out,
            unused if factor is None else factor,
            unused if coefficient is None else coefficient,
            unused if labels is None else labels,
            unused if points is None else points,
            rows,
            columns,
            len(points) if exact else depth,
            B.stride(0) if points is None else points.stride(0),
            *constants(factor is not None, targets, passes == 3 and not exact, True),
        ),
        unused if flag is None else flag,
        depth,
        A.stride(0),
        B.stride(0),
        TRANSPOSED=transposed,
        DOWN=down,
        FLAG=flag is not None,
        PASSES=passes,
        FLATTEN=tile.flatten,
        **launch.options(),
    )
