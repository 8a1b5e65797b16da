"""The largest competing logit of every row, with moments of the competitors, without the logits.

    z = Q C' + b;  for every row i, over the columns k other than labels_i:  max_k z_ik and its k, sum_k z_ik,
    sum_k (z_ik - center)^2, sum_k |z_ik - center|

With Q = C = normalised class vectors and labels = 0..K-1 these are the off-diagonal cosines of the K x K geometry; with
Q = features they give the margin z_y - max z and the nearest competing class of every sample.
"""

import triton
import triton.language as tl

from .launch import Launch, ceil_div, laid_out, on_device
from .primitives import add_logits


@triton.jit
def nearest_kernel(
    Q, C, bias, labels, best, moments, rows, classes, depth, span, center,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    r = row + tl.arange(0, BLOCK_M)
    label = tl.load(labels + r, mask=r < rows, other=-1)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    where = tl.zeros((BLOCK_M,), tl.int32)
    total, square = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    distance = tl.zeros((BLOCK_M,), tl.float32)
    first, last = part * span, tl.minimum((part + 1) * span, classes)
    for column in range(first, last, BLOCK_N):
        z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        z = add_logits(z, Q, C, row, column, rows, classes, depth, 1, False, BLOCK_M, BLOCK_N, BLOCK_K)
        c = column + tl.arange(0, BLOCK_N)
        if BIAS:
            z += tl.load(bias + c, mask=c < classes, other=0.0).to(tl.float32)[None, :]
        keep = (c[None, :] < last) & (c[None, :] != label[:, None])
        top, at = tl.max(tl.where(keep, z, float("-inf")), 1, return_indices=True)
        where = tl.where(top > peak, column + at, where)
        peak = tl.maximum(peak, top)
        total += tl.sum(tl.where(keep, z, 0.0), 1)
        off = tl.where(keep, z - center, 0.0)
        square += tl.sum(off * off, 1)
        distance += tl.sum(tl.abs(off), 1)
    slot, plane = part.to(tl.int64) * rows + r, tl.num_programs(1).to(tl.int64) * rows
    tl.store(best + slot, where, mask=r < rows)
    tl.store(moments + slot, peak, mask=r < rows)
    tl.store(moments + plane + slot, total, mask=r < rows)
    tl.store(moments + 2 * plane + slot, square, mask=r < rows)
    tl.store(moments + 3 * plane + slot, distance, mask=r < rows)


@on_device
def nearest(Q, C, labels, *, bias=None, center=0.0, launch=None, parts=None):
    """(index (rows,) int64, moments (4, rows) fp32: maximum, sum, squares about center, distances from center).

    Q (rows, depth) and C (classes, depth) are single-pass operands; labels (rows,) int32, -1 for no own class. Ties go
    to the lowest class; a row without a competitor has class 0 and maximum -inf.
    """
    from .one_pass import parts_of

    Q, C, labels, bias = laid_out(Q, C, labels, bias)
    rows, depth = Q.shape
    if C.ndim != 2 or C.shape[1] != depth:
        raise ValueError(f"Q {tuple(Q.shape)}, C {tuple(C.shape)}: must be (rows, depth) and (classes, depth)")
    if labels.shape != (rows,) or (bias is not None and bias.shape != (C.shape[0],)):
        raise ValueError(f"labels, bias: one entry for each of {rows} rows and {C.shape[0]} classes")
    launch = launch or Launch.of("nearest", Q)
    tile = launch.tile
    blocks = ceil_div(rows, tile.rows)
    parts, span = parts_of(blocks, C.shape[0], tile.columns) if parts is None else parts
    best = labels.new_empty((parts, rows))
    moments = Q.new_empty((4, parts, rows), dtype=Q[:0].float().dtype)
    nearest_kernel[(blocks, parts)](
        Q, C, labels if bias is None else bias, labels, best, moments, rows, C.shape[0], depth, span, float(center),
        BIAS=bias is not None, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, **launch.compile_options(),
    )  # fmt: skip
    # The first part that attains the maximum: parts run in class order, so ties stay with the lowest class.
    peak, part = moments[0].max(0)
    collected = moments.sum(1)
    collected[0] = peak
    return best.gather(0, part[None])[0].long(), collected
