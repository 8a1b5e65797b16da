"""Certificates with a frozen factor: f* >= f - |grad|^2 / (2 lambda), by strong convexity in the
factor that is free.

For losses convex in the logits. Each row of H has its own lambda_h n_r, times the factor of its
class, and each row of W may have its own lambda_w (`adjustments`); a free bias has none, so nothing
is proved there.
"""

from __future__ import annotations

from torch import Tensor

from ufm_fast.backends.base import Gradients
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.theory.certificates.base import Candidate, Proof


def frozen(candidate: Candidate) -> Proof:
    """The bound of a convex loss with W or H frozen, and no bias or a penalised one."""
    problem, x, spread = candidate.problem, candidate.head, candidate.spread
    of_rows = problem.lambda_h * candidate.weights
    features = None if problem.freeze == "h" else x.features * of_rows[:, None]
    of_w, scale = _classifier(candidate)
    weight = None if problem.freeze == "w" else spread.once(x.weight * (of_w / scale**2))
    b = candidate.point.b  # the head's has the offsets too
    bias = None if b is None else spread.once(spread.whole(b) * problem.lambda_b)
    data = spread.number(float(TiledBackend().head(x, Gradients(features, weight, bias)).value))
    drop = 0.0
    if features is not None:
        drop += spread.number(float((features.square().sum(1) / of_rows).sum())) / 2
    if weight is not None:
        drop += float(((scale * spread.total(weight)).square() / of_w).sum()) / 2
    if bias is not None:
        drop += float(spread.total(bias).square().sum()) / (2 * problem.lambda_b)
    return Proof(data + candidate.penalty - drop)


def _classifier(candidate: Candidate) -> tuple[Tensor, Tensor]:
    """lambda of each row of W, and the scale that the head has multiplied it by; (K, 1) or one for
    all.
    """
    problem, like = candidate.problem, candidate.point.W
    factors, scale = problem.classifier_factors, problem.adjustment.scale
    one = like.new_ones(1, 1)
    of_w = problem.lambda_w * (one if factors is None else factors.to(like)[:, None])
    return of_w, one if scale is None else scale.to(like)[:, None]
