"""Squared error through Gram matrices: no product with N x K entries.

With A = W'W, c = W'b, the half squared error 1/2 |W h_i + b - e_(y_i)|^2 needs d x d matrices and class sums only:

    value     = 1/2 (<W'W, H'H> + 2 <c, sum_i h_i> + N |b|^2 - 2 sum_i (<w_y, h_i> + b_y) + N)
    dh_i      = A h_i + c - w_(y_i)
    dW        = W (H'H) + b (sum_i h_i)' - class sums of H

The value and A h_i - w_y are small differences of large terms near collapse, so Gram matrices accumulate in float64.
One pass over H forms gradient, penalty and (optionally) the momentum step: it reads H and velocity and writes them once.
"""

import triton
import triton.language as tl

from .launch import Launch, check_written, laid_out, on_device
from .primitives import contract, corner, load_tile, multiply, tile_at


@triton.jit
def gram_kernel(
    X, weight, out, rows, columns, stride, span,
    WIDE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of X' diag(weight) X over `span` rows; tiles below the diagonal are left to the symmetric copy."""
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
        out + part.to(tl.int64) * columns * columns, row, column, columns, columns, columns, BLOCK_M, BLOCK_N
    )
    tl.store(place, total, mask=inside)


@triton.jit
def squared_error_kernel(
    H, A, constant, labels, points, weight, current, gradient, velocity, updated, rows, columns, depth, settings,
    STEP: tl.constexpr, PASSES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """gradient = weight_i (A h_i + c - w_y) + penalty h_i; with STEP: v = momentum v + gradient, h -= rate v."""
    stride = depth * (1 if PASSES == 1 else 2)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    tile_row, tile_column = corner(tl.program_id(0), down, across, GROUP)
    row, column = tile_row * BLOCK_M, tile_column * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Of `depth` columns a half of H and A, `columns` are data: A has no more rows than that.
    total = contract(
        total, H, A, row, column, rows, columns, columns, stride, stride, False, True, PASSES, False, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    r, c = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    label = tl.load(labels + r, mask=r < rows, other=-1)
    place, inside = tile_at(gradient, row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    point = points + label.to(tl.int64)[:, None] * columns + c[None, :]
    total += tl.load(constant + c, mask=c < columns, other=0.0)[None, :]
    total -= tl.load(point, mask=inside & (label >= 0)[:, None], other=0.0).to(tl.float32)
    total *= tl.load(weight + r, mask=r < rows, other=0.0)[:, None]
    at_current, inside = tile_at(current, row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
    h = tl.load(at_current, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(settings) * h
    tl.store(place, total, mask=inside)
    if STEP:
        at_velocity, inside = tile_at(velocity, row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
        speed = tl.load(settings + 1) * tl.load(at_velocity, mask=inside, other=0.0) + total
        tl.store(at_velocity, speed, mask=inside)
        at_updated, inside = tile_at(updated, row, column, rows, columns, columns, BLOCK_M, BLOCK_N)
        tl.store(at_updated, h - tl.load(settings + 2) * speed, mask=inside)


@on_device
def gram(X, weight=None, *, launch=None, parts=None):
    """X' diag(weight) X (d, d) in float64 for X (rows, d) of any float dtype; the same bits from run to run.

    weight: (rows,) fp32, or None for ones. float64: on the library. float32: float64 products (on the library where the
    device or the compiler has none). 16-bit: products are exact in fp32, sums of a tile's depth of rows are fp32, and
    these are added up in float64; with weights, as float32 (a copy).
    """
    rows, columns = X.shape
    if weight is not None:
        X, weight = X if X.element_size() == 8 else X.float(), *laid_out(weight)
    X = X if X.stride(1) == 1 else X.contiguous()
    launch = launch or Launch.of("gram", X)
    tile = launch.tile
    wide = X.element_size() == 4
    if X.element_size() == 8 or (wide and X.is_cuda and not has_float64_cores(X.device)):
        double = X.double()
        return double.T @ (double if weight is None else double * weight[:, None])
    across = triton.cdiv(columns, tile.rows)
    parts = parts or max(1, min(64, 528 // across**2, triton.cdiv(rows, 8 * tile.depth)))
    span = triton.cdiv(triton.cdiv(rows, parts), tile.depth) * tile.depth
    out = X.new_zeros((parts, columns, columns), dtype=float64_of(X))
    gram_kernel[(across, triton.cdiv(columns, tile.columns), parts)](
        X, out if weight is None else weight, out, rows, columns, X.stride(0), span,
        WIDE=wide, WEIGHT=weight is not None, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth,
        **launch.compile_options(),
    )  # fmt: skip
    upper = out.sum(0).triu()
    return upper + upper.triu(1).T


def float64_of(x):
    """torch.float64, through a tensor: this module does not import torch."""
    return x.new_zeros(1).double().dtype


def has_float64_cores(device):
    """Whether triton can build a float64 product there: 8.0 and 9.0 (sm_100 does not compile)."""
    from torch.cuda import get_device_capability

    return get_device_capability(device) in ((8, 0), (9, 0))


@on_device
def squared_error_rows(
    H, A, constant, labels, points, weight, current, gradient, *, passes, settings, velocity=None, updated=None,
    launch=None,
):  # fmt: skip
    """Write gradient (N, d) fp32 = weight_i (A h_i + c - w_(y_i)) + penalty h_i and, given velocity, take the step.

    Args:
        H (N, halves * depth), A (d, halves * depth): prepared operands, both of depth columns a half.
        constant: (d,) fp32, W'b. labels: (N,) int32. points: W (K, d) contiguous. weight: (N,) fp32.
        current: (N, d) the stored H. settings: device fp32 (3,) = penalty, momentum, rate: no host synchronisation.
        velocity: (N, d) fp32, updated in place. updated: (N, d), not `current`: other tiles still read that.
    """
    check_written(gradient=gradient, velocity=velocity, updated=updated)
    H, A, constant, labels, points, weight, current = laid_out(H, A, constant, labels, points, weight, current)
    rows, columns = current.shape
    if velocity is not None and (updated is None or updated.data_ptr() == current.data_ptr()):
        raise ValueError("updated: must be another buffer than current")
    launch = launch or Launch.of("squared_error", H, passes)
    tile = launch.tile
    labels = labels.where((labels >= 0) & (labels < points.shape[0]), -1)  # no class, no read
    options = {key: value for key, value in launch.options().items() if key != "TMA"}
    squared_error_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
        H, A, constant, labels, points, weight, current, gradient,
        gradient if velocity is None else velocity, gradient if updated is None else updated,
        rows, columns, H.shape[1] // (1 if passes == 1 else 2), settings,
        STEP=velocity is not None, PASSES=passes, **options,
    )  # fmt: skip
