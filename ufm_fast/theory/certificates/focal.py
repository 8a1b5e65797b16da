"""Certificates of the focal loss, through phi(u), u the logarithm of the off-target mass.

    with a bias                LB = sum_r (n_r/N) [theta c_r Entropy(E_r/s_r) - phi*(theta c_r)]

where phi is made convex beyond the point at which its slope c reaches 1; with up to 1,024 classes
also, without that envelope, by rows that follow the bias (`focal_with_bias`). Without a bias the
rows of G may change their signs, since |G| does not. Then no envelope is needed, for <-S theta G,
Z> <= mu |Z|_* with signs S leaves each row its own global minimum over one number, and theta may
exceed 1:

    bias none                  LB = sum_r (n_r/N) min_{u <= h_r} [phi(u) + theta c_r (h_r - u)],
    h_r = Entropy(E_r/s_r)

(u_r >= h_r + sum_k (E_rk/s_r)(z_k - z_y) by Gibbs' inequality, and phi rises.)
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.sweep import Chunk
from ufm_fast.losses import Focal
from ufm_fast.theory.certificates.base import Candidate, Proof, theta
from ufm_fast.theory.certificates.focal_with_bias import (
    MOST_CLASSES,
    balanced_bound,
    following_bound,
)
from ufm_fast.theory.certificates.softmax import SoftmaxDual
from ufm_fast.theory.focal import Rise, phi


def unbiased_focal(candidate: Candidate) -> Proof:
    """The bound without a bias: rows may change their signs, and theta may exceed 1."""
    mu, dual = candidate.mu, SignedDual(candidate)
    norm = candidate.norm(dual)
    bound = dual.lower_bound(theta(norm, mu))
    if 0.0 < norm.value < mu:
        bound = max(bound, dual.lower_bound(mu / norm.value))
    return candidate.proof(bound, norm)


def biased_focal(candidate: Candidate) -> Proof:
    """The bound with a bias: the better of the convex envelope's and of the rows that follow the
    bias.
    """
    problem, proof = candidate.problem, enveloped_focal(candidate)
    assert isinstance(problem.loss, Focal)
    bound, counts = max(0.0, proof.bound), problem.counts
    if bool((counts == counts[0]).all()):
        bound = max(bound, balanced_bound(problem.loss, len(counts), int(counts[0]), problem.mu))
    if len(counts) <= MOST_CLASSES and candidate.point.layout is None:  # it takes whole factors
        bound = following_bound(
            problem, candidate.rows, candidate.point, candidate.value, known=bound
        )
    return replace(proof, bound=bound)


def enveloped_focal(candidate: Candidate) -> Proof:
    """The bound with a bias by the convex envelope alone, which adjusted logits have too."""
    dual = FocalDual(candidate)
    norm = candidate.norm(dual)
    return candidate.proof(dual.lower_bound(theta(norm, candidate.mu)), norm)


class _FocalRows(SoftmaxDual):
    """What both bounds share: each row's pull, and the entropy of how it is shared out."""

    def __init__(self, candidate: Candidate) -> None:
        assert isinstance(candidate.problem.loss, Focal)
        self.focal = candidate.problem.loss
        super().__init__(candidate)

    def _flow(self, c: Chunk) -> Tensor:
        return c.p * self.focal.weight(c.l, c.p)

    def _shared(self, c: Chunk, G: Tensor) -> tuple[Tensor, Tensor]:
        """(c_r, h_r) of the rows of G, the balancing flow included; G is overwritten."""
        flow = -G[c.entry_row, c.entry_class]
        G[c.entry_row, c.entry_class] = 0.0
        return flow, torch.special.entr(G.div_(flow.clamp_min(1e-300)[:, None])).sum(1)


class FocalDual(_FocalRows):
    """With a bias: slopes beyond 1 are cut, as the convex envelope's are."""

    def __init__(self, candidate: Candidate) -> None:
        super().__init__(candidate)
        self.rise = Rise(self.focal, 1.0)

    def _flow(self, c: Chunk) -> Tensor:
        return super()._flow(c).clamp_max(1.0)

    def _row_bounds(self, c: Chunk, G: Tensor, theta: float) -> Tensor:
        flow, entropy = self._shared(c, G)
        slope = (theta * flow).clamp(1e-300, 1.0)
        u = self.rise.invert(slope)
        value: Tensor = slope * entropy - slope * u + phi(self.focal, u)
        return value


class SignedDual(_FocalRows):
    """Without a bias: no envelope, and no limit on theta."""

    limit = math.inf

    def __init__(self, candidate: Candidate) -> None:
        super().__init__(candidate)
        self.rise = Rise(self.focal)

    def _row_bounds(self, c: Chunk, G: Tensor, theta: float) -> Tensor:
        flow, entropy = self._shared(c, G)
        # phi(u) - slope u falls, rises from its stationary point on, and may fall again up to the
        # end u = entropy.
        return torch.minimum(*self.rise.below((theta * flow).clamp_min(1e-300), entropy))
