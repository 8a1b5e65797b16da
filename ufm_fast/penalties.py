"""The one place of lambda: the penalty of every part of a point, and the scales that make them all
alike.

With P factors (W, H and the hidden layers between) and mu the geometric mean of their lambdas, the
scales s_j = prod_(i != j) (lambda_i / lambda_j)^(1/2P) give each factor X_j = s_j x_j the penalty
mu/2 |x_j|^2. Their product is 1, and the layers are positively homogeneous, so the logits of the
x_j are those of the X_j: the same function, far better conditioned. For two factors s_W = (lambda_H
/ lambda_W)^(1/4) = 1 / s_H.

Decisions

2026-11-25. Solvers work in balanced variables by default: rows sqrt(n_k) (lambda_h/lambda_w)^(1/4)
h_k and (lambda_w/lambda_h)^(1/4) w_k. It is the same function with the penalty mu/2 on both
factors. `variables="raw"` is there for the dynamics of the papers.

2026-11-25. The bias is balanced too. In the balanced variables b = c / sqrt(1 + lambda_b / mu), so
that no penalty is far above mu. With lambda_b = 100 and mu = 3e-6 the bias had a curvature 3e7
times the others' and cost thousands of evaluations; now as many as with a small one
(`tests/solvers/test_methods.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.point import Point, inner


def geometric_mean(factors: Sequence[float]) -> float:
    """(prod lambda_j)^(1/P), without overflow; 0 where one is."""
    if len(factors) == 2:
        return math.sqrt(factors[0] * factors[1])
    return math.exp(math.fsum(map(math.log, factors)) / len(factors)) if all(factors) else 0.0


def balancing_scales(factors: Sequence[float]) -> list[float]:
    """s_j of each factor. lambda_j s_j^2 = mu for all j."""
    power = 1.0 / (2 * len(factors))
    return [
        math.prod((other / own) ** power for i, other in enumerate(factors) if i != j)
        for j, own in enumerate(factors)
    ]


@dataclass(frozen=True)
class Coefficients:
    """A number for each part of a point: for W, or for each row of it (K, 1), for each row of H
    (R, 1), for b, for each hidden layer.
    """

    weight: float | Tensor
    rows: Tensor
    bias: float
    hidden: tuple[float, ...] = ()


@dataclass(frozen=True)
class Penalties(Coefficients):
    """lambda of each part: the penalty is sum of lambda/2 |part|^2, with the rows' own lambdas for
    H.
    """

    @cached_property
    def even(self) -> bool:
        """Whether there are rows and all have the same."""
        return self.rows.numel() > 0 and bool((self.rows == self.rows[0]).all())

    def to(self, dtype: torch.dtype) -> Penalties:
        weight = self.weight.to(dtype) if isinstance(self.weight, Tensor) else self.weight
        return Penalties(weight, self.rows.to(dtype), self.bias, self.hidden)

    def value(self, x: Point) -> float:
        """The penalty of a point, summed in float64."""
        total = 0.5 * self._of_classifier(x)
        if self.even:
            total += 0.5 * float(self.rows[0]) * _square(x.H)
        else:
            squares = torch.linalg.vecdot(x.H, x.H).double()
            total += 0.5 * float(squares @ self.rows[:, 0].double())
        if x.b is not None and self.bias:
            total += 0.5 * self.bias * float(x.b.double() @ x.b.double())
        for W, coefficient in zip(x.counted, self.hidden, strict=False):
            total += 0.5 * coefficient * _square(W)
        return x.summed(total)

    def _of_classifier(self, x: Point) -> float:
        """lambda |W|^2, of this rank's rows."""
        if isinstance(self.weight, Tensor):
            return float(torch.linalg.vecdot(x.W, x.W).double() @ self.weight[:, 0].double())
        return self.weight * _square(x.W)

    def energies(self, x: Point) -> dict[str, float]:
        """lambda |X|^2 of each factor by its name: equal at every critical point."""
        parts = {name: part for name, part in x.named().items() if name != "b"}
        H = float(torch.linalg.vecdot(x.H, x.H).double() @ self.rows[:, 0].double())
        squares = {"W": x.summed(self._of_classifier(x)), "H": x.summed(H)}
        return squares | {
            f"hidden{j}": c * _square(parts[f"hidden{j}"]) for j, c in enumerate(self.hidden, 1)
        }

    def size(self, x: Point) -> float:
        """The sum over the factors of |lambda X|: what a gradient's norm is small against."""
        if isinstance(self.weight, Tensor):
            weights = math.sqrt(x.summed(_square(x.W * self.weight)))
        else:
            weights = self.weight * math.sqrt(x.summed(_square(x.W)))
        if x.layout is not None:
            features = math.sqrt(x.summed(_square(x.H * self.rows)))
        elif self.even:
            features = float(self.rows[0]) * math.sqrt(_square(x.H))
        else:
            features = float(torch.linalg.vector_norm((x.H * self.rows).double()))
        layers = sum(
            c * math.sqrt(_square(W)) for W, c in zip(x.counted, self.hidden, strict=False)
        )
        return weights + features + (x.summed(layers) if x.hidden else layers)


def _square(x: Tensor) -> float:
    return inner(x, x)
