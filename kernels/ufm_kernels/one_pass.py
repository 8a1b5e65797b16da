"""Loss and both gradients with E never stored, for features of at most 128 columns.

    forward   a program owns rows: streams the classes, keeps s, the sum of rounded E, max u and E V
    weight    a program owns classes: streams the rows, keeps E' X and E' f

Like attention with V = W, but the offset z_y is known beforehand, so nothing is rescaled on the
way. Either loop can be cut into parts (a second grid axis) whose results are summed in a fixed
order, for when rows or classes are few.
"""

import triton
import triton.language as tl

from .launch import Launch, ceil_div, head_of, laid_out, next_power_of_2, on_device
from .primitives import (
    Head,
    exponential,
    mask_targets,
    multiply,
    multiply_pairs,
    round_to,
    store_sums,
    tile_at,
)
from .squared_error import float64_of


@triton.jit
def load_half(matrix, row, shift, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """A block of rows, all columns, of one half of an operand."""
    place, inside = tile_at(matrix + shift, row, 0, rows, columns, stride, HEIGHT, WIDTH)
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def load_pair(
    matrix, row, rows, columns, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PASSES: tl.constexpr
):
    """Both halves of a block of rows; the first twice where there is one."""
    stride = columns * (1 if PASSES == 1 else 2)
    high = load_half(matrix, row, 0, rows, columns, stride, HEIGHT, WIDTH)
    low = load_half(matrix, row, (PASSES // 2) * columns, rows, columns, stride, HEIGHT, WIDTH)
    return high, low


@triton.jit
def round_pair(x, SINGLE: tl.constexpr):
    """x as a rounded half and the rounded rest."""
    high = round_to(x, SINGLE)
    return high, round_to(x - high.to(tl.float32), SINGLE)


@triton.jit
def multiply_halves(a, a_low, b, b_low, total, PASSES: tl.constexpr, TURNED: tl.constexpr = False):
    """total + a b, or the product of two pairs if PASSES is 3."""
    if PASSES == 3:
        total = multiply_pairs(a, a_low, b, b_low, total, TURNED)
    else:
        total = multiply(a, b, total)
    return total


@triton.jit
def forward_kernel(
    H,
    W,
    V,
    head: Head,
    offset,
    flag,
    statistics,
    out,
    depth,
    width,
    span,
    FLAG: tl.constexpr,
    SINGLE: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
):
    rows, classes = head.rows, head.classes
    row, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first, last = part * span, tl.minimum((part + 1) * span, classes)
    written = rows
    if FLAG:
        awake = tl.load(flag) != 0
        last, written = tl.where(awake, last, first), tl.where(awake, rows, 0)
    r = row + tl.arange(0, BLOCK_M)
    h, h_low = load_pair(H, row, rows, depth, BLOCK_M, D, PASSES)
    shift = tl.load(offset + r, mask=r < rows, other=0.0)[:, None]
    mass, kept = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    for column in tl.range(first, last, BLOCK_N, disable_licm=PASSES == 3 and D > 64):
        c = column + tl.arange(0, BLOCK_N)
        w, w_low = load_pair(W, column, classes, depth, BLOCK_N, D, PASSES)
        z = multiply_halves(
            h, h_low, w.T, w_low.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PASSES
        )
        if head.BIAS:
            z += tl.load(head.bias + c, mask=c < classes, other=0.0).to(tl.float32)[None, :]
        z = mask_targets(
            tl.where(c[None, :] < last, z, float("-inf")), head.labels, r, c, rows, head.TARGETS
        )
        peak = tl.maximum(peak, tl.max(z, 1))
        z = exponential(z, shift, not SINGLE and PASSES == 1)
        mass += tl.sum(z, 1)
        e, e_low = round_pair(z, SINGLE)
        kept += tl.sum(e.to(tl.float32), 1)
        if PASSES == 3:
            kept += tl.sum(e_low.to(tl.float32), 1)
        v, v_low = load_pair(V, column, classes, width, BLOCK_N, D, PASSES)
        total = multiply_halves(e, e_low, v, v_low, total, PASSES)
    store_sums(statistics, part, tl.num_programs(1), r, rows, written, mass, kept, peak)
    place, inside = tile_at(
        out + part.to(tl.int64) * rows * width, row, 0, written, width, width, BLOCK_M, D
    )
    tl.store(place, total, mask=inside)


@triton.jit
def weight_kernel(
    H,
    W,
    X,
    head: Head,
    offset,
    factor,
    out,
    sums,
    depth,
    width,
    span,
    SINGLE: tl.constexpr,
    PASSES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
):
    rows, classes = head.rows, head.classes
    column, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    first, last = part * span, tl.minimum((part + 1) * span, rows)
    c = column + tl.arange(0, BLOCK_M)
    w, w_low = load_pair(W, column, classes, depth, BLOCK_M, D, PASSES)
    if head.BIAS:
        shift = tl.load(head.bias + c, mask=c < classes, other=0.0).to(tl.float32)
    weights = tl.zeros((BLOCK_M,), tl.float64)  # a sum over a million rows
    total = tl.zeros((BLOCK_M, D), tl.float32)
    for row in tl.range(first, last, BLOCK_N, disable_licm=PASSES == 3 and D > 64):
        r = row + tl.arange(0, BLOCK_N)
        h, h_low = load_pair(H, row, rows, depth, BLOCK_N, D, PASSES)
        # The logits of `forward_kernel` to the last bit: E and the sums that it is divided by must
        # err alike.
        z = multiply_halves(
            w, w_low, h.T, h_low.T, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PASSES, TURNED=True
        )
        if head.BIAS:
            z += shift[:, None]
        origin = tl.load(offset + r, mask=r < rows, other=0.0)[None, :]
        z = tl.where(r[None, :] < last, z, float("-inf"))
        z = mask_targets(z, head.labels, r, c, rows, head.TARGETS, TURNED=True)
        z = exponential(z, origin, not SINGLE and PASSES == 1)
        e, e_low = round_pair(z, SINGLE)
        kept = e.to(tl.float32) + e_low.to(tl.float32) if PASSES == 3 else e.to(tl.float32)
        weights += tl.sum(kept * tl.load(factor + r, mask=r < rows, other=0.0)[None, :], 1).to(
            tl.float64
        )
        x, x_low = load_pair(X, row, rows, width, BLOCK_N, D, PASSES)
        total = multiply_halves(e, e_low, x, x_low, total, PASSES)
    tl.store(sums + part.to(tl.int64) * classes + c, weights, mask=c < classes)
    place, inside = tile_at(
        out + part.to(tl.int64) * classes * width, column, 0, classes, width, width, BLOCK_M, D
    )
    tl.store(place, total, mask=inside)


def parts_of(blocks, length, block, resident=264):
    """(parts, span): how many parts to cut a loop of `length` into so that blocks * parts fills the
    device.
    """
    parts = max(1, min(resident // max(blocks, 1), ceil_div(length, 8 * block)))
    span = ceil_div(ceil_div(length, parts), block) * block
    return ceil_div(length, span), span


def block_width(depth, width):
    """The constant D: a power of two that holds the columns of the operands and of the values."""
    return max(16, next_power_of_2(max(depth, width)))


@on_device
def forward(
    H, W, V, bias, offset, labels, *, passes, flag=None, into=None, launch=None, parts=None
):
    """(statistics (3, parts, rows), E V (parts, rows, width) fp32) with E = exp(H W' + b - offset),
    zero at the targets.

    H, W and V are operands of `passes`; with float32 operands E is kept in tf32, else in bfloat16
    (V then is, too). Statistics are the sums of E and of rounded E and the maxima of z. `flag`,
    `into` as in `off_target`.
    """
    H, W, V, bias, offset, labels = laid_out(H, W, V, bias, offset, labels)
    halves = 1 if passes == 1 else 2
    rows, depth, width = H.shape[0], H.shape[1] // halves, V.shape[1] // halves
    launch = launch or Launch.of("one_pass", V, passes)
    tile = launch.tile
    blocks = ceil_div(rows, tile.rows)
    parts, span = parts_of(blocks, W.shape[0], tile.columns) if parts is None else parts
    statistics, out = into or (
        offset.new_empty((3, parts, rows)),
        offset.new_empty((parts, rows, width)),
    )
    forward_kernel[(blocks, parts)](
        H,
        W,
        V,
        head_of(bias, labels, offset, W.shape[0]),
        offset,
        flag if flag is not None else labels,
        statistics,
        out,
        depth,
        width,
        span,
        FLAG=flag is not None,
        SINGLE=V.element_size() == 4,
        PASSES=passes,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        D=block_width(depth, width),
        **launch.compile_options(),
    )
    return statistics, out


@on_device
def transposed(H, W, X, bias, offset, labels, factor, *, passes, launch=None, parts=None):
    """(E' X (classes, width) fp32, E' factor (classes,) fp64), E as in `forward`, X (rows, halves *
    width).
    """
    H, W, X, bias, offset, labels, factor = laid_out(H, W, X, bias, offset, labels, factor)
    halves = 1 if passes == 1 else 2
    classes, depth, width = W.shape[0], W.shape[1] // halves, X.shape[1] // halves
    launch = launch or Launch.of("one_pass_weight", X, passes)
    tile = launch.tile
    blocks = ceil_div(classes, tile.rows)
    parts, span = parts_of(blocks, H.shape[0], tile.columns) if parts is None else parts
    out = offset.new_empty((parts, classes, width))
    sums = offset.new_empty((parts, classes), dtype=float64_of(offset))
    weight_kernel[(blocks, parts)](
        H,
        W,
        X,
        head_of(bias, labels, offset, classes),
        offset,
        factor,
        out,
        sums,
        depth,
        width,
        span,
        SINGLE=X.element_size() == 4,
        PASSES=passes,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        D=block_width(depth, width),
        **launch.compile_options(),
    )
    return out.sum(0), sums.sum(0)
