"""Device functions that every kernel shares: loads of a tile, the tensor-core product, tile order,
rounding.

What belongs together is one NamedTuple (`Block`, `Operand`, `Head`), which a kernel takes as an
argument or makes of its own: the code is that of the arguments one by one, and of a member as of an
argument the launcher sees whether it is divisible by 16, or 1. Constants are its last members, and
a driver wraps them (`launch.constants`).

Traps (triton 3.6.0 to 3.9.0). A TMA descriptor has to be an argument itself: of one in a bundle the
launcher of 3.6.0 and 3.7.1 knows nothing. Constants that are assigned to a name, within a tuple
too, are taken for tensors: a bundle is made in the call, and a member that must stay a constant is
annotated, ``WIDTH: tl.constexpr = block.WIDTH``. Under the interpreter it stays a ``tl.constexpr``,
and so is its product with a loop's counter or, from the left, with a tensor: the one is cast, the
other comes first.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton import knobs

# The interpreter multiplies bfloat16 bit patterns as integers, so operands are widened there.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))
LOG2E = tl.constexpr(1.4426950408889634)


class Block(NamedTuple):
    """The constants of a kernel's tile: rows and columns of the output, depth of a step, loads by
    descriptor, tile rows of a band (`corner`).
    """

    HEIGHT: tl.constexpr
    WIDTH: tl.constexpr
    DEPTH: tl.constexpr
    TMA: tl.constexpr
    GROUP: tl.constexpr


class Operand(NamedTuple):
    """A factor of a product: matrix or descriptor, rows, stride; DOWN: stored with its depth
    down.
    """

    matrix: tl.tensor
    rows: tl.tensor
    stride: tl.tensor
    DOWN: tl.constexpr


class Head(NamedTuple):
    """What becomes of logits before the exponential: a bias, and labels (rows, TARGETS) to mask."""

    bias: tl.tensor
    labels: tl.tensor
    rows: tl.tensor
    classes: tl.tensor
    TARGETS: tl.constexpr
    BIAS: tl.constexpr


@triton.jit
def tile_at(matrix, row, column, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(pointers, mask) of the HEIGHT x WIDTH tile at (row, column) of a row-major matrix.

    The corner is a 64-bit offset; offsets inside the tile are 32-bit (HEIGHT * stride < 2^31),
    which saves registers.
    """
    i, j = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
    return matrix + (tl.cast(row, tl.int64) * stride + column) + (
        i[:, None] * stride + j[None, :]
    ), inside


@triton.jit
def load_tile(
    source,
    row,
    column,
    shift,
    rows,
    columns,
    stride,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """The HEIGHT x WIDTH tile at (row, column + shift); zero outside rows x columns.

    `source` is a descriptor if TMA, else a pointer to a row-major matrix. `shift` selects the
    second half of a split operand. A descriptor masks against the whole matrix, both halves: what
    it reads past `columns` of the first half lands in output columns that are never stored, or is
    zero by the padding of the operand.
    """
    if TMA:
        tile = source.load([row, column + shift])
    else:
        place, inside = tile_at(source + shift, row, column, rows, columns, stride, HEIGHT, WIDTH)
        tile = tl.load(place, mask=inside, other=0.0)
    return tile


@triton.jit
def multiply(a, b, total):
    """total + a b on the tensor cores, accumulated in fp32; fp32 operands are taken as tf32."""
    if INTERPRETED:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="tf32")
    return total


@triton.jit
def multiply_pairs(a, a_low, b, b_low, total, TURNED: tl.constexpr = False):
    """total + (a + a_low)(b + b_low), without the product of the two low halves; TURNED: the bits
    of the transposed product.

    Tensor cores truncate where they add to an accumulator, and over thousands of steps that costs
    more than a pair has beyond its high half. So the three products of a block are summed apart,
    the small ones first, and their sum is added to the total by an addition that rounds to nearest.
    """
    part = tl.zeros_like(total)
    if TURNED:
        part = multiply(a, b_low, part)
    part = multiply(a_low, b, part)
    if not TURNED:
        part = multiply(a, b_low, part)
    part = multiply(a, b, part)
    return total + part


@triton.jit
def load_operand(
    source, row, k, shift, depth, HEIGHT: tl.constexpr, SPAN: tl.constexpr, TMA: tl.constexpr
):
    """The HEIGHT x SPAN tile at (row, k) of an operand."""
    matrix, rows, stride = source.matrix, source.rows, source.stride
    if source.DOWN:
        tile = load_tile(matrix, k, row, shift, depth, rows, stride, SPAN, HEIGHT, TMA).T
    else:
        tile = load_tile(matrix, row, k, shift, rows, depth, stride, HEIGHT, SPAN, TMA)
    return tile


@triton.jit
def contract(total, A, B, row, column, depth, block, PASSES: tl.constexpr):
    """total + the tile of A B' at (row, column), A (rows, depth) and B (columns, depth) before
    `Operand`'s DOWN.

    With 3 PASSES both are pairs, [high | low] along their rows in memory.
    """
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    SPAN: tl.constexpr = block.DEPTH
    TMA: tl.constexpr = block.TMA
    for step in range(tl.cdiv(depth, SPAN)):
        k = tl.cast(step, tl.int32) * SPAN
        a = load_operand(A, row, k, 0, depth, HEIGHT, SPAN, TMA)
        b = load_operand(B, column, k, 0, depth, WIDTH, SPAN, TMA)
        if PASSES == 3:
            a_low = load_operand(A, row, k, A.stride // 2, depth, HEIGHT, SPAN, TMA)
            b_low = load_operand(B, column, k, B.stride // 2, depth, WIDTH, SPAN, TMA)
            total = multiply_pairs(a, a_low, b.T, b_low.T, total)
        else:
            total = multiply(a, b.T, total)
    return total


@triton.jit
def add_logits(total, H, W, row, column, rows, classes, depth, block, PASSES: tl.constexpr):
    """total + the tile of H W' at (row, column), of operands as `operands` prepares them."""
    stride = depth * (1 if PASSES == 1 else 2)
    return contract(
        total,
        Operand(H, rows, stride, False),
        Operand(W, classes, stride, False),
        row,
        column,
        depth,
        block,
        PASSES,
    )


@triton.jit
def halves_of(tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half of a tile, which stay in the registers that hold them."""
    left, right = tile.reshape(HEIGHT, 2, WIDTH // 2).permute(0, 2, 1).split()
    return left, right


@triton.jit
def corner(tile, tiles_down, tiles_across, GROUP: tl.constexpr):
    """(tile row, tile column) in an order that walks bands of GROUP tile rows, so that operands
    stay in L2.
    """
    per_band = tiles_across * GROUP
    band = tile // per_band
    height = tl.minimum(tiles_down - band * GROUP, GROUP)
    inside = tile - band * per_band
    return band * GROUP + inside % height, inside // height


@triton.jit
def mask_targets(z, labels, row, column, rows, TARGETS: tl.constexpr, TURNED: tl.constexpr = False):
    """z with -inf at the targets of its rows; TURNED: the rows lie across, and the classes down.

    labels is (rows, TARGETS) int32, padded with -1. A loop, and no tile of booleans: dozens of
    targets must not spill.
    """
    for t in tl.range(TARGETS, num_stages=1):
        label = tl.load(labels + row.to(tl.int64) * TARGETS + t, mask=row < rows, other=-1)
        z = mask_target(z, label, column, TURNED)
    return z


@triton.jit
def mask_target(z, label, column, TURNED: tl.constexpr = False):
    """z with -inf at one target of each row."""
    if TURNED:
        z = tl.where(column[:, None] == label[None, :], float("-inf"), z)
    else:
        z = tl.where(column[None, :] == label[:, None], float("-inf"), z)
    return z


@triton.jit
def exponential(z, shift, QUICK: tl.constexpr):
    """exp(z - shift). QUICK: by the device's instruction, which takes results below 2^-126 for
    zero.

    The difference comes before its scale: a common offset of both cancels, and no fused product
    rounds it otherwise.
    """
    if QUICK:
        power = (z - shift) * LOG2E
        if INTERPRETED:
            e = tl.exp2(power)
        else:
            e = tl.inline_asm_elementwise(
                "ex2.approx.ftz.f32 $0, $1;",
                "=f,f",
                [power],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    else:
        e = tl.exp(z - shift)
    return e


@triton.jit
def store_sums(statistics, part, parts, r, rows, written, mass, kept, peak):
    """Sums of E, sums of rounded E and maxima of rows r in slot ``part`` of (3, parts, rows), of
    rows below ``written``.
    """
    slot = statistics + part.to(tl.int64) * rows + r
    plane = parts.to(tl.int64) * rows
    tl.store(slot, mass, mask=r < written)
    tl.store(slot + plane, kept, mask=r < written)
    tl.store(slot + 2 * plane, peak, mask=r < written)


@triton.jit
def round_to(x, SINGLE: tl.constexpr):
    """x rounded to nearest as the tensor cores will read it: bfloat16, or tf32 in a float32 (which
    they truncate).
    """
    if SINGLE:
        rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(
            tl.float32, bitcast=True
        )
    elif INTERPRETED:  # which would truncate
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (
            ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000)
            .to(tl.float32, bitcast=True)
            .to(tl.bfloat16)
        )
    # Two at a time: the compiler's own conversion is one at a time, on the unit that the
    # exponentials need.
    else:
        rounded = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return rounded
