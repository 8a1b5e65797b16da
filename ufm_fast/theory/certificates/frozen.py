"""Certificates with a frozen factor: f* >= f - |grad|^2 / (2 lambda), by strong convexity in the
factor that is free.

For losses convex in the logits. Each row of H has its own lambda_h n_r; a free bias has none, so
nothing is proved there.
"""

from __future__ import annotations

from ufm_fast.backends.base import Gradients
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.theory.certificates.base import Candidate, Proof


def frozen(candidate: Candidate) -> Proof:
    """The bound of a convex loss with W or H frozen, and no bias or a penalised one."""
    problem, x, counts, spread = (
        candidate.problem,
        candidate.head,
        candidate.counts,
        candidate.spread,
    )
    features = None if problem.freeze == "h" else x.features * (problem.lambda_h * counts)[:, None]
    weight = None if problem.freeze == "w" else spread.once(x.weight * problem.lambda_w)
    bias = None if x.bias is None else spread.once(x.bias * problem.lambda_b)
    data = spread.number(float(TiledBackend().head(x, Gradients(features, weight, bias)).value))
    drop = 0.0
    if features is not None:
        drop += (
            spread.number(float((features.square().sum(1) / (problem.lambda_h * counts)).sum())) / 2
        )
    if weight is not None:
        drop += float(spread.total(weight).square().sum()) / (2 * problem.lambda_w)
    if bias is not None:
        drop += float(spread.total(bias).square().sum()) / (2 * problem.lambda_b)
    return Proof(data + candidate.penalty - drop)
