"""The tile of the Hessian-vector product: how the logit gradient moves when features and classes
move.

    du = dH W' + H dW' + db - (its target entry),    R = E (a du + c)

with a_i = phi'(s_i), c_i = phi''(s_i) ds_i of the row. R is the off-target part of the directional
derivative of the logit gradient; E is read and R written over it, so a chunk needs no second
buffer. R then enters the same two products as E (`products`), and its row sums are its target
entries.

Open. A common offset v of all logits that comes through W is rounded into du = dH W' + .., which
loses eps |v| |dh|; value and gradient have it cancel (`head`). It would cancel here with W and dW
less one of their rows wherever all are close to it, which is exact in any format (Sterbenz); but
that is a copy of both, K x d each, and a pass that looks.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .launch import Launch, ceil_div, check_written, constants, descriptor, laid_out, on_device
from .primitives import Block, add_logits, corner, round_to


class Moves(NamedTuple):
    """What R takes beside the moved logits: (classes,) db, and of each row its target's move, slope
    and curvature.
    """

    db: tl.tensor
    base: tl.tensor
    slope: tl.tensor
    curvature: tl.tensor
    BIAS: tl.constexpr


@triton.jit
def hvp_kernel(
    H,
    W,
    dH,
    dW,
    moves: Moves,
    E,
    sums,
    rows,
    classes,
    depth,
    stride,
    block: Block,
    SINGLE: tl.constexpr,
    PASSES: tl.constexpr,
):
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    halves: tl.constexpr = 1 if PASSES == 1 else 2
    width = stride // halves
    down, across = tl.cdiv(rows, HEIGHT), tl.cdiv(width, WIDTH)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        tile_row, tile_column = corner(tile, down, across, block.GROUP)
        row, column = tile_row * HEIGHT, tile_column * WIDTH
        dz = tl.zeros((HEIGHT, WIDTH), tl.float32)
        dz = add_logits(dz, dH, W, row, column, rows, classes, depth, block, PASSES)
        dz = add_logits(dz, H, dW, row, column, rows, classes, depth, block, PASSES)
        r, c = row + tl.arange(0, HEIGHT), column + tl.arange(0, WIDTH)
        if moves.BIAS:
            dz += tl.load(moves.db + c, mask=c < classes, other=0.0).to(tl.float32)[None, :]
        dz -= tl.load(moves.base + r, mask=r < rows, other=0.0)[:, None]
        place = E + r.to(tl.int64)[:, None] * stride + c[None, :]
        inside = (r[:, None] < rows) & (c[None, :] < width)
        e = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if PASSES == 3:
            e += tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(moves.slope + r, mask=r < rows, other=0.0)[:, None]
        moved = e * (a * dz + tl.load(moves.curvature + r, mask=r < rows, other=0.0)[:, None])
        high = round_to(moved, SINGLE)
        kept = high.to(tl.float32)
        tl.store(place, high, mask=inside)
        if PASSES == 3:
            low = round_to(moved - kept, SINGLE)
            tl.store(place + width, low, mask=inside)
            kept += low.to(tl.float32)
        tl.store(sums + tile_column.to(tl.int64) * rows + r, tl.sum(kept, 1), mask=r < rows)


@on_device
def move_exponentials(H, W, dH, dW, db, base, slope, curvature, E, *, passes, launch=None):
    """Replace E by R = E (slope (dz - base) + curvature) and return the row sums of the rounded R,
    (rows,) fp32.

    H, dH (rows, .) and W, dW (classes, .): operands of `passes`. db (classes,) or None. base,
    slope, curvature: (rows,) fp32: the target entry of dz, phi'(s) and phi''(s) ds.
    """
    check_written(E=E)
    H, W, dH, dW, db, base, slope, curvature = laid_out(H, W, dH, dW, db, base, slope, curvature)
    halves = 1 if passes == 1 else 2
    rows, width = H.shape[0], E.shape[1] // halves
    launch = launch or Launch.of("hvp", H, passes)
    tile = launch.tile
    across = ceil_div(width, tile.columns)
    sums = base.new_empty((across, rows))
    operands = (H, W, dH, dW)
    if tile.tma:
        left, right = (tile.rows, tile.depth), (tile.columns, tile.depth)
        operands = [
            descriptor(x, block)
            for x, block in zip(operands, (left, right, left, right), strict=True)
        ]
    hvp_kernel[launch.grid(ceil_div(rows, tile.rows) * across)](
        *operands,
        Moves(base if db is None else db, base, slope, curvature, *constants(db is not None)),
        E,
        sums,
        rows,
        W.shape[0],
        H.shape[1] // halves,
        E.shape[1],
        SINGLE=E.element_size() == 4,
        PASSES=passes,
        **launch.options(),
    )
    return sums.sum(0)
