"""Drivers: loss and gradients of a softmax head from torch tensors, a bounded chunk of E at a time
or none at all.

The formulas of a row are in `rows`, those of the two products in `products`. Buffers are added to,
so that the caller may fill them with a penalty's gradient beforehand; fresh ones hold nothing, and
are written, which saves a pass or two.

Decisions

2026-11-26. The kernels on a device at last (an H100 and an H200, 15 minutes in all). Every value
test passed at the first try. What the clock said of the design:

- *The epilogue of the off-target exponentials was half its time at small d.* float32 to bfloat16
one at a time runs on the unit that the exponentials need; `exp` with denormals is five instructions
where one fused product and one exponential do (the offset times log2 e is rounded: 1e-7 of the
offset, in bf16 mode alone); masks were taken in every tile. d = 128: 9.4 ms, then 4.2 ms. A program
now loads for its next tile while it finishes one (`flatten`), two programs of 128 x 128 share a
multiprocessor below d = 2048, and a tile leaves in halves. From there on a bias has a tile of its
own: with its columns the one that was timed spills under triton 3.6.0.
- *A library's product adds in place* (`addmm` with float32 out), and its dH goes through a small
epilogue kernel. The table in `tiles` says who multiplies: the library, but for dH at d from 1024 to
2048 and from 4096, and ours alone where torch is asked for deterministic algorithms (cuBLAS repeats
bit for bit on one stream, but refuses then, unless its workspace is set; products with one vector,
of smoothing and biases, need that), where saving the pass of the epilogue was worth 0.2 to 4 %.
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
alone keeps from the largest other logit is made level with it (`band_of`). Not timed on a device.

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

from .blocks import block_classes, sweep_by_blocks
from .launch import on_device
from .library import library_product
from .off_target import off_target
from .one_pass import forward, transposed
from .operands import Mode, empty_chunk, logit_operands, mode_named, operand, product_operand
from .products import add_finished, add_product, add_weighted_sums
from .rows import (
    HeadResult,
    LossFunction,
    Rows,
    as_labels,
    cross_entropy_value,
    cross_entropy_weight,
)
from .segments import Segments, add_class_sums, target_logits
from .squared_error import block_rows, weighted_sum
from .tiles import products_for

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
    _, product = rows.settle(sweep, weight_fn, band=band_of(H, chosen))
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


def column_sums(grad_bias: Tensor | None) -> Tensor | None:
    """Zeros in fp64 to add the sums over all rows to: in fp32 a million equal terms end wrong in
    the third digit.
    """
    return None if grad_bias is None else torch.zeros_like(grad_bias, dtype=torch.float64)


def clear(*buffers: Tensor | None, but: tuple[bool, ...] = (False, False, False)) -> None:
    """Zeros in the buffers that are there, but for those that will be written."""
    for buffer, written in zip(buffers, but, strict=True):
        if buffer is not None and not written:
            buffer.zero_()


def who_multiplies(products: str | None, mode: str, features: Tensor) -> tuple[str, str]:
    """'triton' or 'library' for dH and for dW; ours where torch may refuse its own.

    It does so under deterministic algorithms, then also in products with one vector, of smoothing
    and of the squared error's bias, and says how to allow them; and of half-precision operands with
    float32 results while it tunes its products.
    """
    if products is None and features.is_cuda:
        refused = torch.are_deterministic_algorithms_enabled() or torch.cuda.tunable.is_enabled()
        if not refused:
            return products_for(mode, features.shape[1])
    return (products or "triton",) * 2


def settled(
    rows: Rows,
    H: Tensor,
    W: Tensor,
    bias: Tensor | None,
    E,
    mode: Mode,
    weight_fn,
    *,
    rounded: bool = True,
    blockwise: tuple | None = None,
):
    """Fill E and the vectors of a chunk of rows, from operands of the logits; what the sweep
    returned.

    rounded: E is what the products will read. blockwise: the last arguments of `sweep_by_blocks`,
    which then sweeps.
    """
    operands = H, W, bias, rows.offset, rows.labels, E
    if blockwise is not None:
        sweep = partial(sweep_by_blocks, *operands, *blockwise)
    else:
        sweep = partial(off_target, *operands, passes=mode.passes, classes=len(W))
    return rows.settle(sweep, weight_fn, rounded=rounded, band=band_of(H, mode))


def band_of(H: Tensor, mode: Mode) -> float:
    """How far a logit of a tile may lie from the same sum in another order, relative to it, where
    all terms have one sign.

    A tile adds 16 products at a time, and tensor cores truncate. Pairs are rounded themselves,
    unlike the target's logit.
    """
    pairs = 2.0**-21 if mode.logits == torch.float32 else 2.0**-17
    return (8 + H.shape[1] / 16) * 2.0**-24 + (pairs if mode.passes > 1 else 0.0)


def coefficients(rows: Rows, smoothing: float) -> Tensor:
    """What the target columns of features and classes are multiplied by, (rows, T); the sign is
    minus.
    """
    if not smoothing:
        return rows.own
    return torch.sub(rows.own, rows.scale[:, None], alpha=smoothing).masked_fill_(
        rows.labels == -1, 0.0
    )


def finish(result: HeadResult, smoothing: float, z: Tensor, tilt: Tensor | None) -> HeadResult:
    """The result with the smoothing term in its losses; `tilt` is what `add_smoothing` returned."""
    if tilt is None:
        return result
    own = torch.where(
        z[:, 0] == -torch.inf, 0.0, tilt
    )  # an impossible target: the loss is infinite already
    return result._replace(losses=result.losses + smoothing * own)


def subtract_targets(out, points, labels, own):
    """out_i -= sum_t own_it points_(y_it)."""
    for t in range(labels.shape[1]):
        point = points[labels[:, t].long().clamp(0, len(points) - 1), : out.shape[1]].float()
        out.addcmul_(point, own[:, t, None], value=-1)


def check_buffers(
    features, weight, bias, grad_features, grad_weight, grad_bias, need_features, need_weight
):
    """ValueErrors about the gradient buffers."""
    for name, needed, out, like in (
        ("grad_features", need_features, grad_features, features),
        ("grad_weight", need_weight, grad_weight, weight),
        ("grad_bias", grad_bias is not None, grad_bias, weight[:, 0]),
    ):
        if needed and (
            out is None
            or out.shape != like.shape
            or out.dtype != torch.float32
            or not out.is_contiguous()
        ):
            raise ValueError(
                f"{name}: must be a contiguous float32 tensor of shape {tuple(like.shape)}"
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: must be of shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if bias is not None and not bias.is_contiguous():
        raise ValueError("bias: is strided or expanded; pass bias.contiguous()")


def check(features, weight, labels, row_weight, smoothing, value_fn, chunk_rows, products, mode):
    """ValueErrors of `softmax_value_and_grad` that concern its inputs."""
    rows, classes = features.shape[0], weight.shape[0]
    if features.ndim != 2 or weight.ndim != 2 or features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"features {tuple(features.shape)}, weight {tuple(weight.shape)}: must be (R, d) and "
            f"(K, d)"
        )
    if rows == 0 or classes < 2:
        raise ValueError(
            f"features has {rows} rows and weight {classes} classes: at least 1 and 2 are needed"
        )
    if labels.shape[0] != rows or row_weight.shape != (rows,) or row_weight.dtype != torch.float32:
        raise ValueError(
            f"targets, row_weight: one entry for each of the {rows} rows, row_weight in float32"
        )
    devices = {features.device, weight.device, labels.device, row_weight.device}
    if len(devices) > 1:
        raise ValueError(
            f"features, weight, targets, row_weight: on different devices "
            f"{sorted(map(str, devices))}"
        )
    if labels.shape[1] > 1 and (smoothing or value_fn is not cross_entropy_value):
        raise ValueError("targets: several targets a row work with plain cross-entropy only")
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing={smoothing}: must lie in [0, 1)")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows}: must be at least 1")
    if products not in (None, "triton", "library") or (products == "library" and mode.passes != 1):
        raise ValueError(f"products={products!r}: 'triton', or 'library' in a single-pass mode")


def features_of(x: Tensor, prepared: Tensor, mode: Mode) -> Tensor:
    """The matrix whose dot products the target logits are: what the tiles saw, or the original of a
    split one.
    """
    return prepared if mode.passes == 1 else x


def add_features(out, E, V, turned, rows, smoothing, mode, *, sums=None, fresh=False):
    """out += factor * (E V) - sum_t coefficient_t v_(y_t), by the library if `turned`, V as
    `product_operand`, is None.

    sums: E V, where it is there already. fresh: the library writes into out what else is added to
    it.
    """
    coefficient = coefficients(rows, smoothing)
    if turned is not None:
        right, down = turned
        add_product(
            out,
            E,
            right,
            passes=mode.passes,
            depth=V.shape[0],
            down=down,
            factor=rows.factor,
            coefficient=coefficient,
            labels=rows.labels,
            points=V,
        )
        return
    if sums is None:
        sums = library_product(
            E[:, : len(V)], V[:, : out.shape[1]], out if fresh else None, fresh=fresh
        )
    add_finished(out, sums, rows.factor, coefficient, rows.labels, V, add=not fresh)


def add_weight(out, E, features, factor, mode, products, *, fresh=False):
    """out += E' (factor * H); fresh: the library writes it."""
    if products == "triton":
        X, down = product_operand(features, mode, factor)
        add_product(out, E, X, passes=mode.passes, depth=E.shape[0], transposed=True, down=down)
    else:
        X = operand(features, mode.products, mode.passes, factor)
        library_product(E[:, : out.shape[0]].T, X[:, : out.shape[1]], out, fresh=fresh)


def add_targets(features, labels, own, pull, grad_weight, grad_bias, segments, classes):
    """The target terms of dW and db, summed class by class in a fixed order; ``pull`` is ``own``
    without the smoothing.
    """
    if grad_weight is None and grad_bias is None:
        return
    segments = segments or Segments.of(labels, classes)
    if grad_weight is not None:
        add_class_sums(grad_weight, features.contiguous(), own, segments, -1.0)
    if grad_bias is not None:
        ones = torch.ones((len(labels), 1), device=labels.device)
        add_class_sums(grad_bias.view(-1, 1), ones, pull, segments, -1.0)


def tilt_of(
    features: Tensor, weight: Tensor, middle: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """<h, w_y - middle> + b_y - mean(b) of every row, fp32, a block of rows at a time: a common
    offset cancels first.
    """
    tilt, span = [], block_rows(features.shape[1])
    for part, label in zip(features.split(span), labels.split(span), strict=True):
        own = weight[label.long().clamp(0, len(weight) - 1)].float() - middle
        tilt.append((part.float() * own).sum(1))
    whole = torch.cat(tilt)
    if bias is None:
        return whole
    wide = bias.double()
    return whole + (wide[labels.long().clamp(0, len(weight) - 1)] - wide.mean()).float()


def add_smoothing(
    features,
    weight,
    bias,
    labels,
    row_weight,
    smoothing,
    grad_features,
    grad_weight,
    grad_bias,
    segments,
):
    """The rank-one gradient of -smoothing mean_k z_k; returns z_y - mean_k z_k of every row, None
    without smoothing.

    db takes that of smoothing (z_y - mean_k z_k) as a whole: the two parts cancel where classes are
    balanced, and what is left near collapse would drown in their rounding.
    """
    if not smoothing:
        return None
    classes = weight.shape[0]
    middle = weight.float().mean(0)
    middle += (weight.float() - middle).mean(0)  # right to eps of what the classes differ by
    if grad_features is not None:
        grad_features.addr_(row_weight, middle, alpha=-smoothing)
    if grad_weight is not None:
        grad_weight -= (smoothing / classes) * weighted_sum(features, row_weight)
    if grad_bias is not None:
        share = torch.zeros((classes, 1), dtype=torch.float64, device=labels.device)
        ones = torch.ones((len(labels), 1), device=labels.device)
        add_class_sums(share, ones, row_weight[:, None], segments or Segments.of(labels, classes))
        share -= share[0].clone()  # exactly zero where all classes weigh the same
        grad_bias += smoothing * (share - share.mean())[:, 0]
    return tilt_of(features, weight, middle, bias, labels[:, 0])
