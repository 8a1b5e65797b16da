"""The certificate on spheres: a bound on sum_r (n_r/N) l(t W h_r, y_r) over all unit rows of W and
H, in any dimension.

The loss is convex in the logits Z = t H W', so with G its gradient there, fit(Z') >= fit(Z) + <G,
Z' - Z>. For any positive a_k and c_r, unit rows give <G, t H' W''> >= -t |C^-1/2 G A^-1/2| |C^1/2
H'|_F |A^1/2 W'|_F, hence

    LB = fit - <G, Z> - t |C^-1/2 G A^-1/2| sqrt(sum_k a_k  sum_r c_r).

It is tight at a minimum with a_k = -<w_k, dfit/dw_k> and c_r = -<h_r, dfit/dh_r>, what holds the
rows at their length, for then a_k w_k = -t (G'H)_k; these are positive at minima. Where one is not,
all are taken equal. Offsets and margins are constants, and with scales S of the classes G S takes
the place of G in the norm (`adjustments`). (Our derivation.)

Margins in the angle leave nothing convex, but cos(theta + m) <= x cos m, x = cos(theta), with
equality at theta = 0 (`angular_margins`). With t x cos m as the target's logit the loss is no
greater anywhere and convex in Z, its gradient having cos m times the target's entry: the bound of
that loss is one of this. It is tight where all rows lie on their class's row and are not pulled at
sideways, as they are at the simplex; elsewhere it is true and no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.backends.base import HeadInput
from ufm_fast.theory.certificates.base import Candidate, Proof
from ufm_fast.theory.certificates.operator_norm import NormBound
from ufm_fast.theory.certificates.softmax import SoftmaxDual


class _Straight(Candidate):
    """The point with its angular margins' loss from below: target logits t x cos m."""

    @cached_property
    def cosines(self) -> Tensor:
        """cos m of each row."""
        angular = self.problem.angular
        assert angular is not None
        return angular.angles.to(self.point.W.device).cos()[self.rows.targets.indices]

    @cached_property
    def head(self) -> HeadInput:
        head = super().head
        own = (head.features * head.weight[head.targets.indices]).sum(1)
        margin = own * (1.0 - self.cosines)
        return replace(
            head, angular=None, margin=margin if head.margin is None else margin + head.margin
        )


def angular_spheres(candidate: Candidate) -> Proof:
    """The bound with margins in the angle."""
    straight = _Straight(*(getattr(candidate, field.name) for field in fields(candidate)))
    return _bound(straight, _SphereDual(straight, straight.cosines))


def spheres(candidate: Candidate) -> Proof:
    """The bound at a point of unit rows; its ratio is the norm's, 1 at a minimum."""
    return _bound(candidate, _SphereDual(candidate))


def _bound(candidate: Candidate, dual: _SphereDual) -> Proof:
    spread = candidate.spread
    fit, product = candidate.value, dual.inner_product
    best, ratio, failure = -math.inf, None, 0.0
    for a, c in dual.multipliers():
        dual.scale(a, c)
        # Where a and c hold the rows, G A^-1/2 and its transpose take A^1/2 W and C^1/2 H to one
        # another.
        of_w = spread.here(a).sqrt()[:, None]
        spans = candidate.point.W * of_w, candidate.point.H * c.sqrt()[:, None]
        norm: NormBound = candidate.norm(dual, spans)
        reach = norm.value * math.sqrt(float(a.sum()) * spread.number(float(c.sum())))
        if fit - product - reach > best:
            best, failure = fit - product - reach, norm.failure_probability
            ratio = reach / -product if product < 0 else None
    return Proof(best, ratio, failure)


class _SphereDual:
    """C^-1/2 G A^-1/2 for the row-weighted logit gradient G, with factors ``of_targets`` (R,) on
    the targets' entries; t is in its features.
    """

    def __init__(self, candidate: Candidate, of_targets: Tensor | None = None) -> None:
        inner = SoftmaxDual(candidate)
        inner.of_targets = of_targets
        inner.root, inner.scale = candidate.head.row_weight, None  # G itself: rows (n_r / N) g_r
        self.of_classes = 1.0 if inner.adjustment.scale is None else inner.adjustment.scale
        self.inner, self.head = inner, candidate.head
        t = candidate.problem.temperature
        pulled = inner.adjoint(self.head.features)  # t G'H, K x d
        self.along_w = -(pulled * self.head.weight).sum(1)
        self.along_h = -(inner.forward(self.head.weight) * self.head.features).sum(1)
        self.inner_product = -float(self.along_w.sum())
        self.temperature = t
        self.scale(torch.ones_like(self.along_w), torch.ones_like(self.along_h))

    def multipliers(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(a, c) to try: what holds the rows, where all of it is positive; all equal."""
        least = float(torch.cat([self.along_w, self.along_h]).min())
        if self.inner.spread.least(least) > 0:
            yield self.along_w, self.along_h
        else:
            yield torch.ones_like(self.along_w), torch.ones_like(self.along_h)

    def scale(self, a: Tensor, c: Tensor) -> None:
        self.columns, self.rows = self.of_classes * a.rsqrt(), self.temperature * c.rsqrt()

    def blocks(self) -> Iterator[Tensor]:
        start = 0
        for block in self.inner.blocks():
            yield block * self.rows[start : start + block.shape[0], None] * self.columns
            start += block.shape[0]

    def forward(self, X: Tensor) -> Tensor:
        return self.inner.forward(self.columns[:, None] * X) * self.rows[:, None]

    def adjoint(self, Y: Tensor) -> Tensor:
        return self.inner.adjoint(self.rows[:, None] * Y) * self.columns[:, None]
