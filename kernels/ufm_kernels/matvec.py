"""Products with the logit gradient and its transpose, for features of any width: G X and G' Y
without G.

    G = f (E - s e_y),  E = exp(H W' + b - o) off the target

The optimality certificate needs the operator norm of G, that is, these two products with a few
vectors at a time. Both rebuild E tile by tile; X and Y have up to 16 columns (zero-padded to 16),
which stay in registers.
"""

import triton
import triton.language as tl

from .launch import Launch, ceil_div, head_of, laid_out, on_device
from .one_pass import parts_of
from .primitives import Block, Head, add_logits, mask_targets, multiply_pairs, round_to

VECTORS = 16


@triton.jit
def logit_product_kernel(
    A,
    B,
    X,
    head: Head,
    offset,
    out,
    depth,
    span,
    block: Block,
    TRANSPOSED: tl.constexpr,
    PASSES: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """out_part = E X over a span of columns; TRANSPOSED: A holds the classes and B the samples."""
    HEIGHT: tl.constexpr = block.HEIGHT
    WIDTH: tl.constexpr = block.WIDTH
    if TRANSPOSED:
        rows, columns = head.classes, head.rows
    else:
        rows, columns = head.rows, head.classes
    row, part = tl.program_id(0) * HEIGHT, tl.program_id(1)
    r = row + tl.arange(0, HEIGHT)
    v = tl.arange(0, VECTORS)
    first, last = part * span, tl.minimum((part + 1) * span, columns)
    total = tl.zeros((HEIGHT, VECTORS), tl.float32)
    for column in range(first, last, WIDTH):
        z = tl.zeros((HEIGHT, WIDTH), tl.float32)
        z = add_logits(z, A, B, row, column, rows, columns, depth, block, PASSES)
        c = column + tl.arange(0, WIDTH)
        if TRANSPOSED:
            if head.BIAS:
                z += tl.load(head.bias + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
            z -= tl.load(offset + c, mask=c < columns, other=0.0)[None, :]
            z = mask_targets(z, head.labels, c, r, columns, head.TARGETS, TURNED=True)
        else:
            if head.BIAS:
                z += tl.load(head.bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
            z -= tl.load(offset + r, mask=r < rows, other=0.0)[:, None]
            z = mask_targets(z, head.labels, r, c, rows, head.TARGETS)
        e = tl.exp(tl.where(c[None, :] < last, z, float("-inf")))
        # Both factors as tf32 pairs: a certificate is worth its digits, and this product is the
        # small one.
        x = tl.load(
            X + c.to(tl.int64)[:, None] * VECTORS + v[None, :],
            mask=(c < columns)[:, None],
            other=0.0,
        )
        e_high, x_high = round_to(e, True), round_to(x, True)
        total = multiply_pairs(e_high, e - e_high, x_high, x - x_high, total)
    place = out + (part.to(tl.int64) * rows + r)[:, None] * VECTORS + v[None, :]
    tl.store(place, total, mask=(r < rows)[:, None])


@on_device
def exponential_product(
    H, W, bias, offset, labels, X, *, passes, transposed=False, launch=None, parts=None
):
    """E X (rows, r) for X (classes, r), or E' X (classes, r) for X (rows, r) if `transposed`; r <=
    16, fp32.

    H, W: operands of `passes`; offset (rows,) fp32; labels (rows, T) int32. Targets are excluded
    from E.
    """
    H, W, bias, offset, labels = laid_out(H, W, bias, offset, labels)
    vectors = X.shape[1]
    if vectors > VECTORS:
        raise ValueError(f"X: has {vectors} columns; at most {VECTORS}")
    A, B = (W, H) if transposed else (H, W)
    launch = launch or Launch.of("matvec", A, passes)
    tile = launch.tile
    blocks = ceil_div(A.shape[0], tile.rows)
    parts, span = parts_of(blocks, B.shape[0], tile.columns) if parts is None else parts
    wide = offset.new_zeros((B.shape[0], VECTORS))
    wide[:, :vectors] = X
    out = offset.new_empty((parts, A.shape[0], VECTORS))
    logit_product_kernel[(blocks, parts)](
        A,
        B,
        wide,
        head_of(bias, labels, offset, len(W)),
        offset,
        out,
        A.shape[1] // (1 if passes == 1 else 2),
        span,
        TRANSPOSED=transposed,
        PASSES=passes,
        VECTORS=VECTORS,
        **launch.options(),
    )
    return out.sum(0)[:, :vectors]
