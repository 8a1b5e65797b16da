"""What all certifiers share: the point that is certified, what they prove of it, and the
verdict.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ufm_fast.backends.base import HeadInput
from ufm_fast.backends.tiled import TiledBackend
from ufm_fast.errors import Contradiction
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.spread import Spread
from ufm_fast.tall import qr
from ufm_fast.targets import Rows
from ufm_fast.theory.certificates.operator_norm import NormBound, dense_norm, split_norm
from ufm_fast.theory.certificates.spread import spread_over
from ufm_fast.theory.deep import chord

#: Up to this K the norm of the logit gradient is exact, by a dense K x K Gram matrix.
EXACT_CLASSES = 4096
#: A relative gap up to this counts as certified.
TOLERANCE = 1e-6
#: Value and bound are sums in float64 of terms that may cancel: by this much, relatively, a bound
#: may lie above the value.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Certificate:
    """``lower_bound`` <= min f: always ('exact'), or but for ``failure_probability``
    ('probabilistic'); 'none': no bound.

    ``relative_gap`` = (value - lower_bound) / value, value in float64 at the certified point;
    ``spectral_ratio`` = |G|/mu, 1 at a non-trivial global minimum and below 1 where everything has
    collapsed to zero. ``certified``: the gap is at most ``tolerance``. ``reason``: why there is no
    bound. For d < K - 1 (squared error: below the rank of the minimum) the bound holds but is not
    tight.
    """

    kind: str
    certified: bool
    value: float
    lower_bound: float
    relative_gap: float
    spectral_ratio: float | None
    failure_probability: float = 0.0
    tolerance: float = TOLERANCE
    reason: str = ""

    def summary(self) -> dict[str, Any]:
        """JSON-ready dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Proof:
    """``bound`` <= min f, -inf where nothing is proved; ``ratio`` = |G|/mu where there is one."""

    bound: float
    ratio: float | None = None
    failure_probability: float = 0.0


class Dual(Protocol):
    """The scaled logit gradient G, R x K with rows (sqrt(n_r)/N) g_r."""

    def blocks(self) -> Iterator[Tensor]: ...
    def forward(self, X: Tensor) -> Tensor: ...
    def adjoint(self, Y: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Candidate:
    """A model point in float64, one row of H for each of ``rows``, whose value is to be proved
    close to the minimum. On several ranks both are this one's, and the ``head`` is of these rows
    and all classes (`spread`).
    """

    problem: Problem
    rows: Rows
    point: Point
    exact_classes: int
    seed: int

    @cached_property
    def spread(self) -> Spread:
        return spread_over(self.point.layout)

    @cached_property
    def counts(self) -> Tensor:
        return self.rows.counts.to(self.point.W.device).double()

    @cached_property
    def weights(self) -> Tensor:
        """What each row weighs in the penalty of H, float64 (R,)."""
        counts = replace(self.rows, counts=self.counts)
        return self.problem.penalty_weights(counts).to(self.counts.device)

    @cached_property
    def root(self) -> Tensor:
        """The scale of each row of the dual, sqrt(n_r)/N, where it weighs more in the penalty than
        in the loss the less.
        """
        roots = self.weights.sqrt()
        own = roots if self.problem.feature_factors is None else self.counts / roots
        return own / self.problem.num_samples

    @cached_property
    def scale(self) -> Tensor | None:
        """What the columns of the dual are multiplied by, (K,): scales of the classes, over the
        root of the factors on their penalties (`adjustments`); None for ones.
        """
        scale, factors = self.problem.adjustment.scale, self.problem.classifier_factors
        scale = None if scale is None else scale.to(self.point.W.device)
        if factors is None:
            return scale
        root = factors.to(self.point.W.device).rsqrt()
        return root if scale is None else scale * root

    @cached_property
    def head(self) -> HeadInput:
        x = self.point
        W, b = self.spread.whole(x.W), None if x.b is None else self.spread.whole(x.b)
        weight = self.counts / self.problem.num_samples
        targets = self.rows.targets.to(x.W.device)
        features, angular = self.problem.features(x), self.problem.angular
        return self.problem.adjustment.to(x.W.device).apply(
            HeadInput(self.problem.loss, features, W, b, targets, weight, angular=angular)
        )

    @cached_property
    def value(self) -> float:
        """The objective at the point."""
        return (
            self.spread.number(float(self.head.row_weight @ TiledBackend().losses(self.head)))
            + self.penalty
        )

    @property
    def penalty(self) -> float:
        here = replace(self.rows, counts=self.counts)
        return self.problem.penalties(here, self.point.layout).value(self.point)

    @cached_property
    def mu(self) -> float:
        """The price of the nuclear norm of D^1/2 Z: of one layer mu, with layers the least that it
        can be (`deep.chord`).
        """
        problem = self.problem
        return (
            problem.mu if problem.layers == 1 else chord(self.value, problem.mu, 1 + problem.layers)
        )

    def proof(self, bound: float, norm: NormBound) -> Proof:
        """The proof of a bound from dual rows of this norm."""
        ratio = norm.value / self.problem.mu if self.problem.layers == 1 else None
        return Proof(bound, ratio, norm.failure_probability)

    def norm(self, dual: Dual, spans: tuple[Tensor, Tensor] | None = None) -> NormBound:
        """An upper bound on |G|: exact for few classes, else but for a stated probability.

        ``spans`` (K x d, R x d): what its leading singular vectors lie in at a minimum; W and D^1/2
        H where not given.
        """
        classes, spread = self.problem.num_classes, self.spread
        if classes <= self.exact_classes:
            blocks = chain(
                [self.root.new_zeros(0, classes)], dual.blocks()
            )  # a rank may have no rows
            found = dense_norm(blocks, classes, spread)
        else:
            left, factors = self.point.W, self.problem.classifier_factors
            if factors is not None:
                left = left * self.spread.here(factors).to(left).sqrt()[:, None]
            left, right = spans or (left, self.head.features * self.weights.sqrt()[:, None])
            U, V = spread.whole(_basis(left, spread)), _basis(right, spread)
            found = split_norm(dual.forward, dual.adjoint, U, V, seed=self.seed, spread=spread)
        numbers = self.root.new_tensor([found.value, found.estimate, found.failure_probability])
        return NormBound(*spread.first(numbers).tolist())

    def bias_drop(self, column_sum: Tensor) -> float:
        """What a penalised bias takes off the bound at theta = 1; ``column_sum`` = sum_r n_r g_r /
        N, (K,).
        """
        if self.problem.bias != "penalised":
            return 0.0
        return float(column_sum.square().sum()) / (2 * self.problem.lambda_b)


def theta(norm: NormBound, mu: float) -> float:
    """The largest factor up to 1 with theta |G| <= mu."""
    return 1.0 if norm.value <= mu else mu / norm.value


def judge(value: float, proof: Proof) -> Certificate:
    """The certificate of a value from what is proved of the minimum."""
    # The penalties and data terms are non-negative, so zero is a lower bound too.
    bound, failure = max(0.0, proof.bound), proof.failure_probability
    if not math.isfinite(proof.bound):
        return without("the dual rows of this point prove nothing", value, proof.ratio)
    if bound > value * (1.0 + ROUNDING):
        reason = (
            f"the bound {bound:.15g} came out above the value {value:.15g}: one of them is wrong, "
            f"please report it"
        )
        warnings.warn(reason, Contradiction, stacklevel=2)
        return without(reason, value, proof.ratio)
    bound = min(bound, value)  # rounding
    gap = (value - bound) / value if value > 0 else 0.0
    kind = "exact" if failure == 0 else "probabilistic"
    return Certificate(kind, gap <= TOLERANCE, value, bound, gap, proof.ratio, failure)


def without(reason: str, value: float = math.nan, ratio: float | None = None) -> Certificate:
    """The certificate where there is no bound."""
    return Certificate("none", False, value, -math.inf, math.inf, ratio, reason=reason)


def _basis(X: Tensor, spread: Spread) -> Tensor:
    """Orthonormal basis of the column span of X (float64), by the eigenvectors of its Gram matrix
    and a clean-up QR.
    """
    values, vectors = map(spread.first, torch.linalg.eigh(spread.total(X.T @ X)))
    keep = values > 1e-20 * values[-1].clamp_min(1e-300)
    if float(values[-1]) == 0.0:
        return X[:, :0]
    return qr(X @ (vectors[:, keep] / values[keep].sqrt()), spread.mesh)[0]
