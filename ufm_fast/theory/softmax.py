"""Minima of softmax losses with balanced classes (and the few that need no balance), as explicit
formulas.

Every formula is for f = (1/N) sum_i l_i + lambda_W/2 |W|^2 + lambda_H/2 |H|^2, natural logarithms,
n samples for each of K classes. A bias changes nothing (0 is its minimiser), except for the focal
loss: `focal_minimum` says where. The minimisers are simplex equiangular tight frames: logits a (I -
J/K) with a the *gap* between the target's logit and the others'. They need dimension d >= K-1.
Notation: mu = sqrt(lambda_W lambda_H), s = sqrt(n) mu, c = K s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.theory.arguments import (
    check_counts,
    check_integer,
    check_positive,
    check_smoothing,
    nuclear_coefficient,
)
from ufm_fast.theory.convex import bisect, golden_section


def class_price(classes: int, per_class: int, lambda_w: float, lambda_h: float) -> float:
    """s = sqrt(n lambda_W lambda_H): what one unit of gap costs, for each of the K-1 directions of
    the simplex.
    """
    check_integer("classes", classes, 2)
    return math.sqrt(check_integer("per_class", per_class, 1)) * nuclear_coefficient(
        lambda_w, lambda_h
    )


def spread_entropy(classes: int, off: float) -> float:
    """Entropy in nats of (1 - (K-1) p, p, ..., p), relatively exact as p -> 0."""
    rest = (classes - 1) * off
    return (
        -(1 - rest) * math.log1p(-rest) - rest * math.log(off)
        if rest < 1
        else -rest * math.log(off)
    )


def ce_gap(
    classes: int, per_class: int, lambda_w: float, lambda_h: float, smoothing: float = 0.0
) -> float:
    """Logit gap at the minimum of balanced cross-entropy: a = log(1/p - K + 1), p = s +
    smoothing/K; 0 once p >= 1/K.

    p is each wrong class's probability at the minimum. Source: see `ce_minimum`.
    """
    off = class_price(classes, per_class, lambda_w, lambda_h) + check_smoothing(smoothing) / classes
    return math.log1p((1 - classes * off) / off) if classes * off < 1 else 0.0


def ce_minimum(
    classes: int, per_class: int, lambda_w: float, lambda_h: float, smoothing: float = 0.0
) -> float:
    """Minimum of balanced cross-entropy, with or without label smoothing: Entropy(1 - (K-1) p, p,
    ..., p).

    p = s + smoothing/K, for targets (1 - smoothing) e_y + smoothing/K. At c = K s >= 1 - smoothing
    the minimiser is W = H = 0 and the minimum log K. Holds for d >= K-1.
    Geometry: arXiv 2105.02375 (cross-entropy), arXiv 2210.02192 (smoothing); the explicit value is
    our derivation.
    """
    off = class_price(classes, per_class, lambda_w, lambda_h) + check_smoothing(smoothing) / classes
    return spread_entropy(classes, off) if classes * off < 1 else math.log(classes)


def focal_loss(classes: int, gap: float, gamma: float) -> float:
    """(1-p)^gamma (-log p) with p = 1/(1 + (K-1) exp(-gap))."""
    off = (classes - 1) * math.exp(-gap)
    return math.pow(off / (1 + off), gamma) * math.log1p(off)


def focal_pull(classes: int, gap: float, gamma: float) -> float:
    """Minus the derivative of `focal_loss` in the gap: q^gamma (gamma (1-q) (-log(1-q)) + q), q =
    1-p.
    """
    off = (classes - 1) * math.exp(-gap)
    q = off / (1 + off)
    return math.pow(q, gamma) * (gamma * math.log1p(off) / (1 + off) + q)


def focal_gap(
    classes: int, per_class: int, lambda_w: float, lambda_h: float, gamma: float
) -> float:
    """Logit gap of the best simplex for balanced focal loss: the minimiser over a >= 0 of
    `focal_loss` + (K-1) s a.
    """
    price = (classes - 1) * class_price(classes, per_class, lambda_w, lambda_h)
    if not (gamma >= 0 and math.isfinite(gamma)):
        raise InputError(f"gamma={gamma!r}: expected a finite number >= 0")
    # The pull rises to one peak, before log(K-1) whatever gamma is, and then falls for ever, so the
    # only inner minimum is the root beyond the peak.
    high = max(1.0, math.log(classes - 1))
    while focal_pull(classes, high, gamma) >= price:
        high *= 2
    peak = max(np.linspace(0, high, 1025).tolist(), key=lambda gap: focal_pull(classes, gap, gamma))
    if focal_pull(classes, peak, gamma) <= price:
        return 0.0
    gap = bisect(lambda a: focal_pull(classes, a, gamma) - price, peak, high)
    return (
        gap
        if focal_loss(classes, gap, gamma) + price * gap < focal_loss(classes, 0.0, gamma)
        else 0.0
    )


def focal_minimum(
    classes: int, per_class: int, lambda_w: float, lambda_h: float, gamma: float
) -> float:
    """Minimum of balanced focal loss: min over a >= 0 of (1-p)^gamma (-log p) + (K-1) s a. Holds
    for d >= K-1.

    Focal loss is not convex in the logits. Without a bias the value is proved all the same, by the
    duality bound whose rows may change their signs (`certificate`). With a bias it is proved where
    `focal_pull` at the minimiser is at most 1, by the convex envelope, and where
    `following.balanced_bound` meets it, which is everywhere but close to the penalty at which the
    gap jumps to zero. There it can be wrong: classes that have collapsed and classes that have not,
    told apart by their bias, lie below every simplex (K = 30, gamma = 3, s = 0.0412288: 3.07223
    against 3.07229). Geometry: arXiv 2210.02192; the rest is our derivation.
    """
    gap = focal_gap(classes, per_class, lambda_w, lambda_h, gamma)
    return (
        focal_loss(classes, gap, gamma)
        + (classes - 1) * class_price(classes, per_class, lambda_w, lambda_h) * gap
    )


def contrastive_minimum(
    phi: Callable[[float], float], classes: int, per_class: int, lambda_w: float, lambda_h: float
) -> tuple[float, float]:
    """Minimum and gap for any loss with the contrastive property: min over a in [0, 1e6] of phi(a)
    + (K-1) s a.

    `phi(a)` is the loss of a sample whose target logit stands `a` above all the others.
    The property (a bound by a function of sum_j (z_j - z_y), tight for equal z_j): arXiv
    2210.02192; the form in the gap is our derivation. The bracket is found on a grid, so phi may be
    non-convex as long as it is not wild.
    """
    price = (classes - 1) * class_price(classes, per_class, lambda_w, lambda_h)

    def value(gap: float) -> float:
        return float(phi(gap)) + price * gap

    grid = [0.0, *np.geomspace(1e-3, 1e6, 2000).tolist()]
    best = min(range(len(grid)), key=lambda i: value(grid[i]))
    gap = golden_section(value, grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    gap = min((gap, 0.0), key=value)
    return value(gap), gap


def nonnegative_ce_minimum(
    counts: Sequence[int] | Tensor, lambda_w: float, lambda_h: float
) -> float:
    """Minimum of cross-entropy over H >= 0 (features after a ReLU), no bias, any counts, d >= K.

    f* = sum_k (n_k/N) Entropy(1 - (K-1) p_k, p_k, ..., p_k),
    p_k = N mu / sqrt(n_k K (K-1)), capped at 1/K. The classes decouple: h_k is along its own axis.
    Setting: Dang et al., 2024 (cross-entropy with features after a ReLU); the explicit value is our
    derivation.
    """
    n = check_counts(counts)
    n, classes = n[n > 0], len(n)
    total = float(n.sum())
    off = total * nuclear_coefficient(lambda_w, lambda_h) / torch.sqrt(n * classes * (classes - 1))
    terms = [spread_entropy(classes, min(p, 1 / classes)) for p in off.tolist()]
    return math.fsum(
        weight * term for weight, term in zip((n / total).tolist(), terms, strict=True)
    )


def layer_peeled_ce_minimum(classes: int, energy_w: float, energy_h: float) -> float:
    """Minimum of balanced cross-entropy under (1/K) sum_k |w_k|^2 <= E_W and (1/N) sum_i |h_i|^2 <=
    E_H, d >= K-1.

    f* = log(1 + (K-1) exp(-K/(K-1) sqrt(E_W E_H))). Setting: arXiv 2101.12699 (the
    layer-peeled model); the value is our derivation.
    """
    check_integer("classes", classes, 2)
    energy = math.sqrt(check_positive("energy_w", energy_w)) * math.sqrt(
        check_positive("energy_h", energy_h)
    )
    return math.log1p((classes - 1) * math.exp(-classes / (classes - 1) * energy))


def normalised_ce_minimum(
    classes: int, scale: float, dim: int, smoothing: float = 0.0, margin: float = 0.0
) -> float | None:
    """Minimum of cross-entropy with unit-norm features and classifier rows, logits scale <w_k,
    h_i>, no penalty.

    f* = log(1 + (K-1) exp(-a)) + smoothing (K-1) a / K with the gap a = min(scale K/(K-1),
    log(K/smoothing - K + 1)). `scale` is the factor on the logits: tau in arXiv 2209.09211, the
    inverse temperature 1/tau in arXiv 2310.05351. None where the formula does not apply: d < K-1,
    or d = K-1 when smoothing stops the gap short of its largest value (an extra dimension is then
    needed to tilt the features). ``margin`` is taken off each target's cosine (CosFace, arXiv
    1801.09414), which leaves a - scale margin in the exponent; not with smoothing (None). Geometry:
    arXiv 2209.09211; the values are our derivation.
    """
    if margin and smoothing:
        return None
    check_integer("classes", classes, 2)
    widest = check_positive("scale", scale) * classes / (classes - 1)
    wanted = (
        math.log1p(classes * (1 / smoothing - 1)) if check_smoothing(smoothing) > 0 else math.inf
    )
    if check_integer("dim", dim, 1) < classes - (wanted >= widest):
        return None
    gap = min(widest, wanted)
    left = gap - scale * margin
    if left < 0:
        return math.log(math.exp(left) + classes - 1) - left
    return math.log1p((classes - 1) * math.exp(-left)) + smoothing * (classes - 1) * gap / classes


def angular_ce_minimum(classes: int, scale: float, dim: int, margin: float) -> float | None:
    """Minimum of the same with margins in the angle (ArcFace, arXiv 1801.07698): target logits
    scale cos(theta + margin).

    f* = log(1 + (K-1) exp(-scale (cos(margin) + 1/(K-1)))), at the simplex with features along
    their own rows. For cos(theta + m) = x cos m - sin m sqrt(1 - x^2) <= x cos m, x = cos(theta),
    and with x cos m in its place the loss is convex, the mean of its exponents being scale sum_jk
    M_jk <w_j, h_k>, |K M| = cos m + 1/(K-1) while that is at least 1 - cos m. None where it does
    not apply: d < K-1, or cos(margin) < (K-2)/(2K-2). Our derivation. Beyond theta + m = pi the
    target's logit may be whatever is at most scale x cos m, as -scale is.
    """
    check_integer("classes", classes, 2)
    level = math.cos(margin) + 1 / (classes - 1)
    if (
        check_integer("dim", dim, 1) < classes - 1
        or not 0 <= margin < math.pi
        or level < 1 - math.cos(margin)
    ):
        return None
    return math.log1p((classes - 1) * math.exp(-check_positive("scale", scale) * level))
