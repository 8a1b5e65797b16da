"""Certificates with a frozen factor: f* >= f - |grad|^2 / (2 lambda), by strong convexity in the factor that is free.

For losses convex in the logits. Each row of H has its own lambda_h n_r; a free bias has none, so nothing is proved there.
"""

from __future__ import annotations

from ufm_fast.backends.base import Gradients
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.theory.certificates.base import Candidate, Proof


def frozen(candidate: Candidate) -> Proof:
    """The bound of a convex loss with W or H frozen, and no bias or a penalised one."""
    problem, x, counts = candidate.problem, candidate.point, candidate.counts
    features = None if problem.freeze == "h" else x.H * (problem.lambda_h * counts)[:, None]
    weight = None if problem.freeze == "w" else x.W * problem.lambda_w
    bias = None if x.b is None else x.b * problem.lambda_b
    data = TiledBackend().head(candidate.head, Gradients(features, weight, bias)).value
    drop = 0.0
    if features is not None:
        drop += float((features.square().sum(1) / (problem.lambda_h * counts)).sum()) / 2
    if weight is not None:
        drop += float(weight.square().sum()) / (2 * problem.lambda_w)
    if bias is not None:
        drop += float(bias.square().sum()) / (2 * problem.lambda_b)
    return Proof(float(data) + candidate.penalty - drop)
