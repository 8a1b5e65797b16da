"""Certificates of the squared error, from the gradient of a point and from the best dual rows of
all, which are known.

    LB = -theta <G, Y> - (N/2) theta^2 |G|_F^2     (G with rows g_r / N, a row a sample)

or, where that is not tight, `squared_error.mse_bound`, which no rounding of a point is in. To
target vectors without a bias or with a free one the minimum itself is known in any dimension
(`forms.dense`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends import residual, squared_error
from ufm_fast.backends.base import HeadInput
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.problem import Problem
from ufm_fast.theory.arguments import bias_penalty
from ufm_fast.theory.certificates.base import Candidate, Proof, theta
from ufm_fast.theory.forms.dense import target_vectors
from ufm_fast.theory.forms.layers import spectral_mse
from ufm_fast.theory.squared_error import ROUNDING, mse_bound

_TIGHT = 1e-10  # relative gap at which no better dual rows are looked for


def squares(candidate: Candidate) -> Proof:
    """The bound of the squared error, any bias."""
    problem, dual = candidate.problem, SquaredDual(candidate)
    norm = candidate.norm(dual)
    bound = dual.lower_bound(theta(norm, problem.mu))
    if candidate.value - bound > _TIGHT * candidate.value and _rank_fits(problem):
        bound = max(
            bound,
            mse_bound(problem.counts, problem.lambda_w, problem.lambda_h, bias_penalty(problem)),
        )
    return candidate.proof(bound, norm)


def vector_squares(candidate: Candidate) -> Proof:
    """The bound of the squared error to target vectors, any bias."""
    proof = chord_squares(candidate)
    if (
        candidate.problem.bias == "penalised"
        or candidate.value - proof.bound <= _TIGHT * candidate.value
    ):
        return proof
    return replace(proof, bound=max(proof.bound, known_vectors(candidate).bound))


def known_vectors(candidate: Candidate) -> Proof:
    """The minimum of the squared error to target vectors, which is known without a bias or with a
    free one, linear layers.
    """
    return Proof(target_vectors(candidate.problem).value * (1.0 - ROUNDING))


def layered_squares(candidate: Candidate) -> Proof:
    """The bound with linear layers and no bias or a free one: the minimum itself, which is
    known.
    """
    form = spectral_mse(candidate.problem)
    return chord_squares(candidate) if form is None else Proof(form.value * (1.0 - ROUNDING))


def chord_squares(candidate: Candidate) -> Proof:
    """The bound of any layers: one layer's, at the least price of the nuclear norm."""
    dual = SquaredDual(candidate)
    norm = candidate.norm(dual)
    return candidate.proof(dual.lower_bound(theta(norm, candidate.mu)), norm)


def _rank_fits(problem: Problem) -> bool:
    """Whether the dimensions may hold the squared error's minimiser, or its bound costs nothing: it
    has no bias.
    """
    return problem.bias == "none" or problem.dim >= int((problem.counts > 0).sum()) - 1


class SquaredDual:
    """g_r = W h_r + b - e_y; with a free bias, which no bound depends on, b is the one that makes
    their mean vanish.
    """

    def __init__(self, candidate: Candidate) -> None:
        problem, head, self.spread = candidate.problem, candidate.head, candidate.spread
        if problem.bias == "free":
            for _ in range(2):  # the second takes what rounding left of the first
                assert head.bias is not None
                head = replace(
                    head, bias=head.bias - self.spread.total(squared_error.residual_sum(head))
                )
        self.head, self.backend = head, TiledBackend()
        self.root, self.scale = candidate.root, candidate.scale
        self.column_sum = self.spread.total(squared_error.residual_sum(head))
        self.shift = (
            self.column_sum if problem.bias == "free" else torch.zeros_like(self.column_sum)
        )
        self.drop = candidate.bias_drop(self.column_sum)

    def blocks(self) -> Iterator[Tensor]:
        for part, G in residual.blocks(self.head, exact=True):
            block = G.sub_(self.shift).mul_(self.root[part, None])
            yield block if self.scale is None else block * self.scale

    def forward(self, X: Tensor) -> Tensor:
        X = X if self.scale is None else self.scale[:, None] * X
        product = self.backend.logit_gradient(self._unit()).times(X)
        return product - torch.outer(self.root, (self.shift @ X).reshape(-1))

    def adjoint(self, Y: Tensor) -> Tensor:
        product = self.backend.logit_gradient(self._unit()).transposed_times(Y)
        total = self.spread.total(product - torch.outer(self.shift, self.root @ Y))
        return total if self.scale is None else total * self.scale[:, None]

    def _unit(self) -> HeadInput:
        return replace(self.head, row_weight=self.root)

    def lower_bound(self, theta: float) -> float:
        along = self.spread.number(
            float(squared_error.along_targets(self.head, self.shift))
        )  # <G, Y>
        squares = self.spread.number(float(self.head.row_weight @ self.backend.losses(self.head)))
        squares -= 0.5 * float(self.shift.square().sum())
        quadratic = squares + self.drop
        # The bound is a concave parabola in theta: its top, where |G| allows.
        best = -along / (2 * quadratic) if quadratic > 0 else theta
        theta = min(theta, max(best, 0.0))
        return -theta * along - theta**2 * quadratic
