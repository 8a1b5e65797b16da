"""Drivers of second order: Hessian-vector products of a softmax head, and products with its logit
gradient.

With E, s, T, M, l, p of `rows`, and du the direction's logits less the mean of their target
entries:

    ds = sum_k E_k du_k over the other classes, dT = sum_t exp(u_t) du_t over the targets
    logit gradient   G_k = a E_k,                   a = M g'(l) / (T + s)
    its derivative   R_k = E_k (a du_k + c),        c = M (g''(l) ds - g'(l) (ds + dT)) / (T + s)^2
    off the targets, and on them a exp(u_t) (du_t - (ds + dT) / (T + s)), which for one target is
    minus the row's sum. So Hessian-vector product: features R W + G dW, classes R' H + G' dH, bias
    R' 1.

ds needs no pass of its own: it is h . (E dW) + dh . (E W) + E db, whose products are needed anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .head_checks import check, check_buffers
from .head_parts import coefficients, column_sums, features_of, settled, subtract_targets
from .hvp import move_exponentials
from .launch import on_device
from .matvec import exponential_product
from .operands import empty_chunk, logit_operands, mode_named, operand, product_operand
from .products import add_product, add_weighted_sums
from .rows import (
    LossFunction,
    Rows,
    as_labels,
    cross_entropy_value,
    cross_entropy_weight,
    mean_over,
)
from .segments import Segments, add_class_sums, target_logits
from .squared_error import weighted_sum


def cross_entropy_curvature(log_ratio: Tensor, probability: Tensor) -> Tensor:
    """g''(l) = 0."""
    return torch.zeros_like(log_ratio)


@torch.no_grad()
@on_device
def softmax_hvp(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    weight_fn: LossFunction = cross_entropy_weight,
    curvature_fn: LossFunction = cross_entropy_curvature,
    smoothing: float = 0.0,
    *,
    d_features: Tensor,
    d_weight: Tensor,
    d_bias: Tensor | None = None,
    out_features: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None = None,
    chunk_rows: int = 4096,
    mode: str = "bf16",
    segments: Segments | None = None,
) -> None:
    """Add the Hessian of sum_i row_weight_i loss_i times (d_features, d_weight, d_bias) to the out
    buffers.

    Arguments as in `head.softmax_value_and_grad`; curvature_fn is g''(l, p), and with several
    targets a row g is the identity. Directions have the shapes of what they move; `d_bias` only
    with a bias.
    """
    chosen = mode_named(mode).of_directions
    labels = as_labels(targets)
    check(
        features,
        weight,
        labels,
        row_weight,
        smoothing,
        cross_entropy_value,
        chunk_rows,
        "triton",
        chosen,
    )
    check_buffers(features, weight, bias, out_features, out_weight, out_bias, True, True)
    for name, moved, like in (
        ("d_features", d_features, features),
        ("d_weight", d_weight, weight),
        ("d_bias", d_bias, bias),
    ):
        if moved is not None and (like is None or moved.shape != like.shape):
            wanted = "None without a bias" if like is None else f"of shape {tuple(like.shape)}"
            raise ValueError(f"{name}: must be {wanted}, got shape {tuple(moved.shape)}")
    if labels.shape[1] > 1 and weight_fn is not cross_entropy_weight:
        raise ValueError("targets: several targets a row work with plain cross-entropy only")
    passes, classes = chosen.passes, weight.shape[0]
    d_bias = None if d_bias is None else d_bias.float().contiguous()
    H, W, dH, dW = (
        operand(x, chosen.logits, passes) for x in (features, weight, d_features, d_weight)
    )
    down = chosen.products != torch.float32
    same = down and chosen.logits == chosen.products
    V, dV = (W, dW) if same else (product_operand(x, chosen)[0] for x in (weight, d_weight))
    exact = [
        features_of(x, prepared, chosen)
        for x, prepared in ((features, H), (weight, W), (d_features, dH), (d_weight, dW))
    ]
    z = target_logits(exact[0], exact[1], bias, labels)
    known = labels != -1
    du = target_logits(exact[2], exact[1], None, labels) + target_logits(
        exact[0], exact[3], d_bias, labels
    )
    base = mean_over(du, labels)
    du = torch.where(known, du - base[:, None], 0.0)
    E = empty_chunk(min(chunk_rows, len(H)), classes, chosen, features.device)
    moves, every, sums = [], Rows.of(z, labels, row_weight), column_sums(out_bias)
    for start in range(0, len(H), chunk_rows):
        part = slice(start, start + chunk_rows)
        rows, e, scale = every.part(part), E[: len(H[part])], row_weight[part]
        settled(rows, H[part], W, bias, e, chosen, weight_fn)
        a = rows.factor
        moved, turned = torch.zeros_like(out_features[part]), torch.zeros_like(out_features[part])
        add_product(moved, e, V, passes=passes, depth=classes, down=down)
        add_product(turned, e, dV, passes=passes, depth=classes, down=down)
        ds = (d_features[part].float() * moved).sum(1) + (features[part].float() * turned).sum(1)
        if d_bias is not None:
            add_weighted_sums(ds, e, d_bias, passes=passes, classes=classes, transposed=False)
        ds -= base[part] * rows.kept
        c, own = second_factor(rows, ds, du[part], weight_fn, curvature_fn)
        c, own = c * scale, own * scale[:, None]
        out_features[part].addcmul_(turned, a[:, None])
        product, _ = product_operand(d_features[part], chosen, a)
        add_product(out_weight, e, product, passes=passes, depth=len(e), transposed=True, down=down)
        moved = move_exponentials(
            H[part], W, dH[part], dW, d_bias, base[part], a, c, e, passes=passes
        )
        # The target entries take what makes the row sum to zero with E as it was rounded.
        moves.append(own + target_share(z[part], known[part]) * (moved - own.sum(1))[:, None])
        add_product(out_features[part], e, V, passes=passes, depth=classes, down=down)
        product, _ = product_operand(features[part], chosen)
        add_product(out_weight, e, product, passes=passes, depth=len(e), transposed=True, down=down)
        if out_bias is not None:
            ones = torch.ones_like(scale)
            add_weighted_sums(sums, e, ones, passes=passes, classes=classes)
    own, moved = coefficients(every, smoothing), torch.cat(moves)
    add_target_terms(
        (features, weight, d_features, d_weight),
        labels,
        own,
        moved,
        (out_features, out_weight, sums),
        segments,
    )
    if out_bias is not None:
        out_bias += sums
    if smoothing:
        out_features.addr_(row_weight, d_weight.float().mean(0), alpha=-smoothing)
        out_weight -= (smoothing / classes) * weighted_sum(d_features, row_weight)


def second_factor(rows, ds, du, weight_fn, curvature_fn):
    """c of every row, rescaled for the rounding of E as the first factor is, and minus the
    derivative at each target.
    """
    z, known, offset, mass, kept = rows.z, rows.labels != -1, rows.offset, rows.mass, rows.kept
    unit = torch.where(known, torch.exp(z - offset[:, None]), 0.0)
    count = known.sum(1)
    # A row without targets counts as one of logit zero.
    whole = torch.where(count > 0, unit.sum(1), torch.exp(-offset)) + mass
    count, log_ratio, probability = count.clamp_min(1), rows.log_ratio, rows.probability
    rescale = torch.where(kept > 0, mass / kept, 1.0)
    ds = ds * rescale
    slope, shift = weight_fn(log_ratio, probability), ds + (unit * du).sum(1)
    change = curvature_fn(log_ratio, probability) * ds - slope * shift
    own = (count * slope / whole)[:, None] * unit * ((shift / whole)[:, None] - du)
    return count * change * rescale / whole**2, own


def target_share(z, known):
    """Softmax among the targets of a row, (rows, T); 0 on the padding. A single target has all,
    impossible (-inf) or not.
    """
    if z.shape[1] == 1:
        return known.to(z.dtype)
    top = torch.where(known, z, float("-inf")).amax(1, keepdim=True)
    weights = torch.where(known, torch.exp(z - top.masked_fill(top == float("-inf"), 0.0)), 0.0)
    return weights / weights.sum(1, keepdim=True).clamp_min(1e-30)


def add_target_terms(inputs, labels, own, moved, outs, segments):
    """Minus own dw_t and moved w_t over the targets for features; the same by class for the classes
    and the bias.
    """
    features, weight, d_features, d_weight = inputs
    out_features, out_weight, out_bias = outs
    subtract_targets(out_features, d_weight, labels, own)
    subtract_targets(out_features, weight, labels, moved)
    segments = segments or Segments.of(labels, weight.shape[0])
    add_class_sums(out_weight, d_features.contiguous(), own, segments, -1.0)
    add_class_sums(out_weight, features.contiguous(), moved, segments, -1.0)
    if out_bias is not None:
        ones = torch.ones((len(labels), 1), device=labels.device)
        add_class_sums(out_bias.view(-1, 1), ones, moved, segments, -1.0)


@dataclass(frozen=True)
class LogitGradient:
    """The N x K matrix G of derivatives of sum_i row_weight_i loss_i in the logits, as an
    operator.
    """

    product: Callable[..., Tensor]  # E X or E' Y
    factor: Tensor
    own: Tensor
    labels: Tensor
    row_weight: Tensor
    segments: Segments
    classes: int
    smoothing: float

    def times(self, X: Tensor) -> Tensor:
        """G X (R, r) for X (K, r), r <= 16."""
        out = self.factor[:, None] * self.product(X)
        for t in range(self.labels.shape[1]):
            out.addcmul_(
                X[self.labels[:, t].long().clamp(0, self.classes - 1)],
                self.own[:, t, None],
                value=-1,
            )
        return out - (self.smoothing / self.classes) * self.row_weight[:, None] * X.sum(0)

    def transposed_times(self, Y: Tensor) -> Tensor:
        """G' Y (K, r) for Y (R, r), r <= 16."""
        out = self.product(self.factor[:, None] * Y, transposed=True).contiguous()
        add_class_sums(out, Y.contiguous(), self.own, self.segments, -1.0)
        return out - (self.smoothing / self.classes) * weighted_sum(Y, self.row_weight).to(Y.dtype)


@torch.no_grad()
@on_device
def logit_gradient(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    row_weight: Tensor,
    weight_fn: LossFunction = cross_entropy_weight,
    smoothing: float = 0.0,
    *,
    chunk_rows: int = 4096,
    mode: str = "bf16x3",
) -> LogitGradient:
    """G of `LogitGradient`; arguments as in `head.softmax_value_and_grad`. Memory: one chunk of E
    while it is built.
    """
    chosen = mode_named(mode)
    labels = as_labels(targets)
    check(
        features,
        weight,
        labels,
        row_weight,
        smoothing,
        cross_entropy_value,
        chunk_rows,
        "triton",
        chosen,
    )
    classes = weight.shape[0]
    H, W = logit_operands(features, weight, chosen)
    z = target_logits(
        features_of(features, H, chosen), features_of(weight, W, chosen), bias, labels
    )
    E = empty_chunk(min(chunk_rows, len(H)), classes, chosen, features.device)
    rows = Rows.of(z, labels, row_weight)
    for start in range(0, len(H), chunk_rows):
        part = slice(start, start + chunk_rows)
        settled(
            rows.part(part), H[part], W, bias, E[: len(H[part])], chosen, weight_fn, rounded=False
        )

    def product(X: Tensor, transposed: bool = False) -> Tensor:
        return exponential_product(
            H, W, bias, rows.offset, labels, X, passes=chosen.passes, transposed=transposed
        )

    own, sorted_labels = coefficients(rows, smoothing), Segments.of(labels, classes)
    return LogitGradient(
        product, rows.factor, own, labels, row_weight, sorted_labels, classes, smoothing
    )
