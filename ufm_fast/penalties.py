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

2026-11-25. Each lambda of a factor is zero or within [1e-30, 1e30], and lambda_b at least 1e-12,
below which float64 cannot tell the bias from a free one, nor a certificate bound it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.arguments import number, sequence
from ufm_fast.errors import InputError
from ufm_fast.point import Point, inner
from ufm_fast.samples import Samples

#: Smaller or larger ones leave nothing of the objective in float64. Written out: 1 / 1e-30 is a
#: little less than 1e30.
LEAST_PENALTY, MOST_PENALTY = 1e-30, 1e30
#: With a smaller one a bias is free but for rounding, and neither theory nor certificate can tell.
LEAST_BIAS_PENALTY = 1e-12


def checked_penalty(given: Any, name: str) -> float:
    """A lambda: zero, or within its range. Errors: InputError / InputTypeError."""
    value = number(given, name)
    if value < 0:
        raise InputError(f"{name} must be a finite number >= 0, got {value}")
    if value != 0 and not LEAST_PENALTY <= value <= MOST_PENALTY:
        raise InputError(
            f"{name} must be 0 or lie in [{LEAST_PENALTY:g}, {MOST_PENALTY:g}], got {value}"
        )
    return value


def checked_hidden_penalties(given: Any, layers: int) -> float | tuple[float, ...] | None:
    """``lambda_hidden`` of a problem: None, one number, or one for each of W_1 .. W_(M-1).

    Errors: InputError / InputTypeError.
    """
    if given is None:
        return None
    if layers == 1:
        raise InputError(
            "lambda_hidden goes with hidden layers, and layers is 1; drop it, or give layers >= 2"
        )
    several = not isinstance(given, (int, float, np.number))
    listed = sequence(given, "lambda_hidden") if several else [given]
    values = tuple(number(x, "lambda_hidden") for x in listed)
    if several and len(values) != layers - 1:
        raise InputError(
            f"lambda_hidden must be one number or one for each of {layers - 1} hidden layers, got "
            f"{len(values)}"
        )
    for value in values:
        if not LEAST_PENALTY <= value <= MOST_PENALTY:
            raise InputError(
                f"lambda_hidden must lie in [{LEAST_PENALTY:g}, {MOST_PENALTY:g}], got {value}; "
                f"give it > 0"
            )
    return values if several else values[0]


def default_penalty(samples: Samples, smoothing: float, *, centred: bool, layers: int) -> float:
    """5e-4, and with one layer at most half of what holds balanced classes together, c = K sqrt(n)
    mu = 1 - smoothing, to two digits; of target vectors, ``centred`` or not, times their size.
    """
    half = 0.5 * (1.0 - smoothing) / math.sqrt(samples.classes * samples.number)
    vectors = samples.given_vectors
    if vectors is not None:  # of unit vectors as many as there are samples this is one
        moved = vectors - vectors.mean(0) if centred else vectors
        size = float(moved.norm()) / math.sqrt(len(vectors))
        half *= size if size > LEAST_PENALTY else 1.0
    return min(5e-4, float(f"{half:.1e}")) if layers == 1 else 5e-4


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
