"""Device functions that every kernel shares: loads of a tile, the tensor-core product, tile order, rounding."""

import triton
import triton.language as tl
from triton import knobs

# The interpreter multiplies bfloat16 bit patterns as integers, so operands are widened there.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@triton.jit
def tile_at(matrix, row, column, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """(pointers, mask) of the HEIGHT x WIDTH tile at (row, column) of a row-major matrix.

    The corner is a 64-bit offset; offsets inside the tile are 32-bit (HEIGHT * stride < 2^31), which saves registers.
    """
    i, j = tl.arange(0, HEIGHT), tl.arange(0, WIDTH)
    inside = (row + i < rows)[:, None] & (column + j < columns)[None, :]
    return matrix + (tl.cast(row, tl.int64) * stride + column) + (i[:, None] * stride + j[None, :]), inside


@triton.jit
def load_tile(source, row, column, shift, rows, columns, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):
    """The HEIGHT x WIDTH tile at (row, column + shift); zero outside rows x columns.

    `source` is a descriptor if TMA, else a pointer to a row-major matrix. `shift` selects the second half of a
    split operand. A descriptor masks against the whole matrix, both halves: what it reads past `columns` of the first
    half lands in output columns that are never stored, or is zero by the padding of the operand.
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
    if INTERPRETED:  # noqa: SIM108 (a constexpr branch, not a select)
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision="tf32")
    return total


@triton.jit
def pass_of(step, steps, PASSES: tl.constexpr):
    """(index of the depth block, 1 if the left low half, 1 if the right low half) of a step of a split product.

    (a + a')(b + b') without a'b' is a product of three times the depth: a b, a b', a' b in turn. So a split operand
    costs no other code than this.
    """
    if PASSES == 1:
        block, low_a, low_b = step, 0, 0
    else:
        part = step // steps
        block, low_a, low_b = step - part * steps, (part == 2).to(tl.int32), (part == 1).to(tl.int32)
    return block, low_a, low_b


@triton.jit
def corner(tile, tiles_down, tiles_across, GROUP: tl.constexpr):
    """(tile row, tile column) in an order that walks bands of GROUP tile rows, so that operands stay in L2."""
    per_band = GROUP * tiles_across
    band = tile // per_band
    height = tl.minimum(tiles_down - band * GROUP, GROUP)
    inside = tile - band * per_band
    return band * GROUP + inside % height, inside // height


@triton.jit
def is_target(labels, row, column, rows, TARGETS: tl.constexpr):
    """Whether column k is one of the targets of row i; labels is (rows, TARGETS) int32, padded with -1."""
    hit = (row[:, None] < 0) & (column[None, :] < 0)
    for t in tl.static_range(TARGETS):
        label = tl.load(labels + row.to(tl.int64) * TARGETS + t, mask=row < rows, other=-1)
        hit = hit | (column[None, :] == label[:, None])
    return hit


@triton.jit
def round_to(x, SINGLE: tl.constexpr):
    """x rounded to nearest as the tensor cores will read it: bfloat16, or tf32 in a float32 (which they truncate)."""
    if SINGLE:  # noqa: SIM108
        rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        rounded = x.to(tl.bfloat16)
    return rounded
