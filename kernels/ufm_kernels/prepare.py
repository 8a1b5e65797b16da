"""Operands in one pass: a matrix times its rows' weights, rounded, or split into two halves, and
padded with zeros.

Decisions

2026-11-26. An operand is prepared in one pass (`prepare`): scaled by its rows' factors, rounded or
split, padded. In torch it was ten passes in the three-pass modes, as many bytes as the squared
error's own work. A Gram matrix takes the rows' weights inside its product, of either sign, so no
weighted copy of H is made where the device multiplies in float64. In the interpreter bfloat16 is
rounded to nearest by its bits, since its cast truncates: tests see the device's numbers.
"""

import triton
import triton.language as tl

from .launch import ceil_div, check_written, laid_out, on_device
from .primitives import round_to, tile_at


@triton.jit
def rounded(x, out):
    """x in the element of `out`, to nearest, where float32 stands for tf32; nan stays nan."""
    if out.dtype.element_ty == tl.float16:
        result = x.to(tl.float16)
    elif out.dtype.element_ty == tl.bfloat16:
        result = round_to(x, False)
    else:  # the sum of bits would carry a device's nan, 0x7fffffff, over into -0
        result = tl.where(x == x, round_to(x, True), x)
    return result


@triton.jit
def prepare_kernel(
    X,
    weight,
    out,
    rows,
    columns,
    width,
    stride,
    WEIGHT: tl.constexpr,
    HALVES: tl.constexpr,
    TURNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row, column = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    place, inside = tile_at(X, row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT:  # the padding is zero whatever the weight
        r = row + tl.arange(0, BLOCK_M)
        x = tl.where(inside, x * tl.load(weight + r, mask=r < rows, other=0.0)[:, None], 0.0)
    if TURNED:
        x = x.T
        there, written = tile_at(out, column, row, columns, width, stride, BLOCK_N, BLOCK_M)
    else:
        there, written = tile_at(out, row, column, rows, width, stride, BLOCK_M, BLOCK_N)
    high = rounded(x, out)
    tl.store(there, high, mask=written)
    if HALVES == 2:
        tl.store(there + width, rounded(x - high.to(tl.float32), out), mask=written)


@on_device
def prepare(x, out, halves, weight=None, *, turned=False):
    """Fill out (rows, halves * width), width >= columns, with x (rows, columns) times weight
    (rows,) fp32 or None.

    turned: out is (columns, halves * width), width >= rows, and takes the transpose of that.
    """
    check_written(out=out)
    x, weight = laid_out(x, weight)
    width = out.shape[1] // halves
    height, span = (32, 64) if turned else (16, 128)
    blocks = (width, x.shape[1]) if turned else (len(x), width)
    prepare_kernel[(ceil_div(blocks[0], height), ceil_div(blocks[1], span))](
        x,
        out if weight is None else weight,
        out,
        *x.shape,
        width,
        out.stride(0),
        WEIGHT=weight is not None,
        HALVES=halves,
        TURNED=turned,
        BLOCK_M=height,
        BLOCK_N=span,
        num_warps=4,
        num_stages=2,
    )
    return out
