"""Drivers: loss and gradients of a softmax head from torch tensors, a bounded chunk of E at a time
or none at all.

The formulas of a row are in `rows`, those of the two products in `products`. Buffers are added to,
so that the caller may fill them with a penalty's gradient beforehand; fresh ones hold nothing, and
are written, which saves a pass or two.

Decisions

2026-11-26. The kernels on a device at last (an H100 and an H200, 15 minutes in all). Every value
test passed at the first try. What the clock said of the design:

- *The epilogue of the off-target exponentials was half its time at small d.* float32 to bfloat16
  one at a time runs on the unit that the exponentials need; `exp` with denormals is five
  instructions where one fused product and one exponential do (the offset times log2 e is rounded:
  1e-7 of the offset, in bf16 mode alone); masks were taken in every tile. d = 128: 9.4 ms, then 4.2
  ms. A program now loads for its next tile while it finishes one (`flatten`), two programs of 128 x
  128 share a multiprocessor below d = 2048, and a tile leaves in halves. From there on a bias has a
  tile of its own: with its columns the one that was timed spills under triton 3.6.0.
- *A library's product adds in place* (`addmm` with float32 out), and its dH goes through a small
  epilogue kernel. The table in `tiles` says who multiplies: the library, but for dH at d from 1024
  to 2048 and from 4096, and ours alone where torch is asked for deterministic algorithms (cuBLAS
  repeats bit for bit on one stream, but refuses then, unless its workspace is set; products with
  one vector, of smoothing and biases, need that), where saving the pass of the epilogue was worth
  0.2 to 4 %.
- *tf32 operands lie along the depth* (`product_operand` writes the transpose in the pass that
  rounds it): products in tf32x3 take half the time.
- *The squared error's own kernel is gone.* The persistent product was faster for the same sum,
  targets included. Gram matrices are cut into more parts.
- *Chunks are up to 2 GiB or 8192 rows*, the larger: fewer launches, and fewer passes over dW.
- On the host triton's `cdiv` costs microseconds a call, and a step had fourteen: ours is plain
  Python.

A comparison within a few per cent depends on who ran before: the card's power limit follows. The
same path listed twice differed by 7 % at (65536, 65536, 512), and by up to 26 % where launches take
longest (`bench/results/nvidia-h200.csv`); contenders run in random order since.

2026-11-29. A common offset of the logits cancels: the row's shift is taken off before the scale to
bits, one subtraction and one product where there was one fused product, and a target that rounding
alone keeps from the largest other logit is made level with it (`head_parts.band_of`). Not timed on
a device.

2026-11-26. Three passes fewer on the device, by counting; not timed yet. Fresh gradients are
written by the library's first product (a beta of 0) instead of cleared and added to: at (4096,
128256, 4096) that is 2.1 GB of dW not cleared and not read, of some 20 ms. The tiles' statistics
are read once: the kernel that looks for overflow keeps their sums in float64, and the one that
finishes rows reads those unless the flag is up (two passes took 0.5 ms of 12 at d = 128,
`bench/results/nvidia-h100-80gb-hbm3.csv`). Class sums start a program a row where rows are fewer
than classes, for a program whose class has no row costs its launch all the same (1 ms of 44 at
(16384, 65536, 4096)). The bench's ceiling, the three products, writes in its first chunk, too.
"""

from functools import partial

import torch
from torch import Tensor

from .blocks import block_classes
from .head_checks import check, check_buffers
from .head_parts import (
    add_features,
    add_smoothing,
    add_targets,
    add_weight,
    band_of,
    clear,
    coefficients,
    column_sums,
    features_of,
    finish,
    settled,
    subtract_targets,
    who_multiplies,
)
from .launch import on_device
from .one_pass import forward, transposed
from .operands import empty_chunk, logit_operands, mode_named, operand, product_operand
from .products import add_weighted_sums
from .rows import (
    HeadResult,
    LossFunction,
    Rows,
    as_labels,
    cross_entropy_value,
    cross_entropy_weight,
)
from .segments import Segments, target_logits

NARROW = 128  # columns of features that the one-pass kernels hold


@torch.no_grad()
@on_device
def softmax_value_and_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    value_fn: LossFunction = cross_entropy_value,
    weight_fn: LossFunction = cross_entropy_weight,
    smoothing: float = 0.0,
    *,
    grad_features: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    chunk_rows: int = 4096,
    mode: str = "bf16",
    need_features: bool = True,
    need_weight: bool = True,
    segments: Segments | None = None,
    products: str | None = None,
    fresh: bool = False,
    block_bytes: int | None = None,
) -> HeadResult:
    """Losses of every row; adds row_weight_i d loss_i to the gradient buffers, which the caller has
    pre-filled.

    Args:
        features (R, d), weight (K, d), bias (K,) or None: any float dtype, rounded or split as
        `mode` says.
        targets: (R,) labels, or (R, T) padded with -1 (cross-entropy summed over the targets; no
            smoothing). Run `segments.check_labels` once on new labels; a label that is no class
            makes its row NaN.
        row_weight: (R,) fp32, sample weight times the scale of the objective.
        value_fn, weight_fn: g(l, p) and g'(l, p) of the loss, on vectors of R entries.
        smoothing: eps of eps (z_y - mean_k z_k), costs no product with N x K entries.
        grad_features (R, d), grad_weight (K, d), grad_bias (K,): contiguous fp32; None only if not
            needed.
        chunk_rows: rows of E held at once; memory is `operands.chunk_bytes(chunk_rows, K, mode)`.
        mode: a key of `operands.MODES`.
        segments: `Segments.of(labels, K)` where the caller has it already.
        products: 'triton', or 'library' for torch.mm and a separate epilogue (single-pass modes
            only); None: as the table in `tiles` says for the device, 'triton' without one.
        fresh: the gradient buffers hold nothing yet, not even zeros: they are written.
        block_bytes: of a block of E that is multiplied while the cache holds it, see `blocks`; 0
            for none; None: as the table in `tiles` says.

    Raises:
        ValueError: shapes, dtypes or options that do not fit.
    """
    chosen = mode_named(mode)
    labels = as_labels(targets)
    check(features, weight, labels, row_weight, smoothing, value_fn, chunk_rows, products, chosen)
    check_buffers(
        features, weight, bias, grad_features, grad_weight, grad_bias, need_features, need_weight
    )
    grad_features, grad_weight = (
        grad_features if need_features else None,
        grad_weight if need_weight else None,
    )
    into = (grad_features, grad_weight, column_sums(grad_bias))
    of_features, of_weight = who_multiplies(products, mode, features)
    write = fresh and not smoothing  # by the library's products; all else adds
    if fresh:
        clear(
            grad_features,
            grad_weight,
            grad_bias,
            but=(write and of_features == "library", write and of_weight == "library", False),
        )
    tilt = add_smoothing(features, weight, bias, labels, row_weight, smoothing, *into, segments)
    classes = weight.shape[0]
    H, W = logit_operands(features, weight, chosen)
    V = W if chosen.logits == chosen.products else operand(weight, chosen.products, chosen.passes)
    turned = None
    if grad_features is not None and of_features == "triton":
        turned = product_operand(weight, chosen) if chosen.products == torch.float32 else (V, True)
    z = target_logits(
        features_of(features, H, chosen), features_of(weight, W, chosen), bias, labels
    )
    E = empty_chunk(min(chunk_rows, len(H)), classes, chosen, features.device)
    every, block = Rows.of(z, labels, row_weight), 0
    if grad_features is not None:
        block = block_classes(block_bytes, mode, len(E), features.shape[1], of_features)
    for start in range(0, len(H), chunk_rows):
        part = slice(start, start + chunk_rows)
        rows, e = every.part(part), E[: len(H[part])]
        blockwise = (V, features.shape[1], block) if block else None
        swept = settled(rows, H[part], W, bias, e, chosen, weight_fn, blockwise=blockwise)
        if grad_features is not None:
            sums = swept[1] if block else None
            out = grad_features[part]
            add_features(out, e, V, turned, rows, smoothing, chosen, sums=sums, fresh=write)
        if grad_weight is not None:
            add_weight(
                grad_weight,
                e,
                features[part],
                rows.factor,
                chosen,
                of_weight,
                fresh=write and start == 0,
            )
        if grad_bias is not None:
            add_weighted_sums(into[2], e, rows.factor, passes=chosen.passes, classes=classes)
    own = coefficients(every, smoothing)
    add_targets(features, labels, own, every.own, grad_weight, into[2], segments, classes)
    if grad_bias is not None:
        grad_bias += into[2]
    return finish(every.result(value_fn), smoothing, z, tilt)


@torch.no_grad()
@on_device
def one_pass_value_and_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    value_fn: LossFunction = cross_entropy_value,
    weight_fn: LossFunction = cross_entropy_weight,
    smoothing: float = 0.0,
    *,
    grad_features: Tensor | None = None,
    grad_weight: Tensor | None = None,
    grad_bias: Tensor | None = None,
    mode: str = "bf16",
    need_features: bool = True,
    need_weight: bool = True,
    segments: Segments | None = None,
    fresh: bool = False,
) -> HeadResult:
    """`softmax_value_and_grad` with E never stored, for d <= 128: logits are formed twice, memory
    is O((R + K) d).
    """
    chosen = mode_named(mode)
    labels = as_labels(targets)
    check(features, weight, labels, row_weight, smoothing, value_fn, 1, "triton", chosen)
    if features.shape[1] > NARROW:
        raise ValueError(
            f"features: {features.shape[1]} columns; the one-pass kernels hold at most {NARROW}"
        )
    check_buffers(
        features, weight, bias, grad_features, grad_weight, grad_bias, need_features, need_weight
    )
    grad_features, grad_weight = (
        grad_features if need_features else None,
        grad_weight if need_weight else None,
    )
    if fresh:
        clear(grad_features, grad_weight, grad_bias)
    H, W = logit_operands(features, weight, chosen)
    V = W if chosen.logits == chosen.products else operand(weight, chosen.products, chosen.passes)
    z = target_logits(
        features_of(features, H, chosen), features_of(weight, W, chosen), bias, labels
    )
    rows = Rows.of(z, labels, row_weight)
    sweep = partial(forward, H, W, V, bias, rows.offset, labels, passes=chosen.passes)
    _, product = rows.settle(sweep, weight_fn, band=band_of(H.shape[1], chosen))
    own = coefficients(rows, smoothing)
    if need_features:
        grad_features.addcmul_(product.sum(0)[:, : features.shape[1]], rows.factor[:, None])
        subtract_targets(grad_features, weight if chosen.passes == 3 else W, labels, own)
    if need_weight or grad_bias is not None:
        X = operand(features, chosen.products, chosen.passes, rows.factor)
        grown, sums = transposed(
            H, W, X, bias, rows.offset, labels, rows.factor, passes=chosen.passes
        )
        if need_weight:
            grad_weight += grown[:, : features.shape[1]]
    into = (grad_features, grad_weight, None if grad_bias is None else sums)
    add_targets(features, labels, own, rows.own, grad_weight, into[2], segments, weight.shape[0])
    tilt = add_smoothing(features, weight, bias, labels, row_weight, smoothing, *into, segments)
    if grad_bias is not None:
        grad_bias += sums
    return finish(rows.result(value_fn), smoothing, z, tilt)
