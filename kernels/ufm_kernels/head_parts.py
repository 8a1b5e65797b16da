"""What the drivers of a softmax head share: who multiplies, the steps between the passes, targets
and smoothing.
"""

from functools import partial

import torch
from torch import Tensor

from .blocks import sweep_by_blocks
from .library import library_product
from .off_target import off_target
from .operands import Mode, operand, product_operand
from .products import add_finished, add_product
from .rows import (
    HeadResult,
    Rows,
)
from .segments import Segments, add_class_sums
from .squared_error import block_rows, weighted_sum
from .tiles import products_for


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
    return rows.settle(sweep, weight_fn, rounded=rounded, band=band_of(H.shape[1], mode))


def band_of(width: int, mode: Mode) -> float:
    """How far a logit of a tile may lie from the same sum in another order, relative to it, where
    all terms have one sign.

    A tile adds 16 products at a time, and tensor cores truncate. Pairs are rounded themselves,
    unlike the target's logit. width: of the logits' operands, with both halves.
    """
    pairs = 2.0**-21 if mode.logits == torch.float32 else 2.0**-17
    return (8 + width / 16) * 2.0**-24 + (pairs if mode.passes > 1 else 0.0)


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
