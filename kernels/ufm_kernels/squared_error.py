"""Squared error through Gram matrices: no product with N x K entries.

With A = W'W, c = W'b, the half squared error 1/2 |W h_i + b - e_(y_i)|^2 needs d x d matrices and
class sums only:

    value     = 1/2 (<W'W, H'H> + 2 <c, sum_i h_i> + N |b|^2 - 2 sum_i (<w_y, h_i> + b_y) + N)
    dh_i      = A h_i + c - w_(y_i)
    dW        = W (H'H) + b (sum_i h_i)' - class sums of H

The value and A h_i - w_y are small differences of large terms near collapse, so Gram matrices
accumulate in float64. The two products are `products.add_product`, which adds the targets in the
same pass.
"""

import triton
import triton.language as tl

from .launch import Launch, ceil_div, laid_out, on_device
from .primitives import load_tile, multiply, tile_at

SPAN = 1 << 24  # numbers that the library's product takes in float64 at a time
PROGRAMS = 2048  # of a Gram matrix: enough that the last ones leave little of a device idle


@triton.jit
def gram_kernel(
    X,
    weight,
    out,
    rows,
    columns,
    stride,
    span,
    WIDE: tl.constexpr,
    WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of X' diag(weight) X over `span` rows; tiles below the diagonal are left to the
    symmetric copy.
    """
    row, column, part = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float64)
    first, last = part * span, tl.minimum((part + 1) * span, rows)
    last = tl.where(column + BLOCK_N > row, last, first)
    for k in range(first, last, BLOCK_K):
        a = load_tile(X, k, row, 0, last, columns, stride, BLOCK_K, BLOCK_M, False)
        b = load_tile(X, k, column, 0, last, columns, stride, BLOCK_K, BLOCK_N, False)
        if WIDE:
            left = a.to(tl.float64)
            if WEIGHT:
                r = k + tl.arange(0, BLOCK_K)
                left *= tl.load(weight + r, mask=r < last, other=0.0).to(tl.float64)[:, None]
            total = tl.dot(left.T, b.to(tl.float64), total, out_dtype=tl.float64)
        else:
            # A short sum in fp32, then float64: for devices without float64 tensor cores.
            total += multiply(a.T, b, tl.zeros((BLOCK_M, BLOCK_N), tl.float32)).to(tl.float64)
    place, inside = tile_at(
        out + part.to(tl.int64) * columns * columns,
        row,
        column,
        columns,
        columns,
        columns,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(place, total, mask=inside)


@on_device
def gram(X, weight=None, *, launch=None, parts=None):
    """X' diag(weight) X (d, d) in float64 for X (rows, d) of any float dtype; the same bits from
    run to run.

    weight: (rows,) fp32, or None for ones. float64: on the library. float32: float64 products (on
    the library where the device or the compiler has none). 16-bit: products are exact in fp32, sums
    of a tile's depth of rows are fp32, and these are added up in float64; with weights, as float32
    (a copy).
    """
    rows, columns = X.shape
    if weight is not None:
        X, weight = X if X.element_size() == 8 else X.float(), *laid_out(weight)
    X = X if X.stride(1) == 1 else X.contiguous()
    launch = launch or Launch.of("gram", X)
    tile = launch.tile
    wide = X.element_size() == 4
    if X.element_size() == 8 or (wide and X.is_cuda and not has_float64_cores(X.device)):
        return library_gram(X, weight)
    across = ceil_div(columns, tile.rows)
    parts = parts or max(1, min(parts_for(across), ceil_div(rows, 8 * tile.depth)))
    span = ceil_div(ceil_div(rows, parts), tile.depth) * tile.depth
    out = X.new_zeros((parts, columns, columns), dtype=float64_of(X))
    gram_kernel[(across, ceil_div(columns, tile.columns), parts)](
        X,
        out if weight is None else weight,
        out,
        rows,
        columns,
        X.stride(0),
        span,
        WIDE=wide,
        WEIGHT=weight is not None,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        **launch.compile_options(),
    )
    upper = out.sum(0).triu()
    return upper + upper.triu(1).T


def parts_for(across: int) -> int:
    """Into how many parts the rows are cut, for a Gram matrix of so many tiles across."""
    return min(64, -(-PROGRAMS // (across * (across + 1) // 2)))


def gram_bytes(rows: int, columns: int) -> int:
    """Bytes that `gram` takes beside its result at most: its parts, and copies in float64 if the
    library multiplies.
    """
    return 8 * columns**2 * (parts_for(-(-columns // 64)) + 2) + min(
        2 * 8 * SPAN, 2 * 8 * rows * columns
    )


def block_rows(columns):
    """Rows of which a copy in float64 takes 128 MiB."""
    return max(1, SPAN // max(columns, 1))


def weighted_sum(X, weight):
    """X' weight (d,) in float64 for X (rows, d) and weight (rows,), a block of rows at a time."""
    span = block_rows(X.shape[1])
    total = X.new_zeros(X.shape[1], dtype=float64_of(X))
    for part, of_part in zip(X.split(span), weight.split(span), strict=True):
        total += part.double().T @ of_part.double()
    return total


def library_gram(X, weight=None):
    """`gram` by library products in float64: eight bands of the upper triangle, of as many rows at
    a time as 128 MiB hold.
    """
    rows, columns = X.shape
    total = X.new_zeros((columns, columns), dtype=float64_of(X))
    height = max(64, ceil_div(columns, 8))
    span = block_rows(columns)
    for first in range(0, rows, span):
        right = X[first : first + span].double()
        left = right if weight is None else right * weight[first : first + span, None]
        for i in range(0, columns, height):
            total[i : i + height, i:].addmm_(left[:, i : i + height].T, right[:, i:])
        del left, right
    return total.triu() + total.triu(1).T


def float64_of(x):
    """torch.float64, through a tensor: this module does not import torch."""
    return x.new_zeros(1).double().dtype


def has_float64_cores(device):
    """Whether triton can build a float64 product there: 8.0 and 9.0 (sm_100 does not compile)."""
    from torch.cuda import get_device_capability

    return get_device_capability(device) in ((8, 0), (9, 0))
