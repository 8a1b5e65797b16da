"""The variables that solvers work in: what the model's parameters are of them, and what the
penalties and the logits are in them. Why they are balanced: `penalties`.

Solver variables x = (B, A, c, V_1 ..) relate to the model's by

    W = weight B  (w_k = weight classes_k b_k where classes have penalties of their own),
    h_r = rows_r a_r,   b = bias c,   W_j = hidden_j V_j

and the logits are those of (B, logits_r a_r, V), since layers are positively homogeneous.
'balanced' takes the s of `penalties.balancing_scales`, rows_r = s_H / sqrt(n_r) and bias = (1 +
lambda_b/mu)^(-1/2),  so that with one layer

    f = sum_r (n_r/N) l(B a_r / sqrt(n_r) + b, y_r) + mu/2 (|A|^2 + |B|^2) + mu lambda_b / (mu +
    lambda_b) |c|^2 / 2

with mu = sqrt(lambda_w lambda_h), which is the same function, far better conditioned when counts or
penalties differ. 'raw' has all scales 1; with a frozen factor or a lambda of zero only the rows'
are others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.adjustments import Adjustment
from ufm_fast.backends.base import Gradients, compute_dtype
from ufm_fast.layout import Layout
from ufm_fast.penalties import Penalties, balancing_scales
from ufm_fast.point import Point
from ufm_fast.problem import Problem

VARIABLES = ("balanced", "raw")


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales of ``problem``, of this rank's rows and classes where ``layout`` says so.

    ``rows`` and ``logits`` are (R, 1), ``classes`` (K, 1) or None. ``penalties`` are those of the
    solver's variables; ``adjustment`` is the problem's, with the scales ``classes``, which are
    factors of the logits too, taken in.
    """

    problem: Problem
    layout: Layout | None
    weight: float
    classes: Tensor | None
    rows: Tensor
    bias: float
    hidden: tuple[float, ...]
    logits: Tensor
    penalties: Penalties
    adjustment: Adjustment

    @classmethod
    def of(
        cls, problem: Problem, weights: Tensor, *, balanced: bool, layout: Layout | None = None
    ) -> Scales:
        """``weights``: of the rows here in the penalty, float64 (R,)."""
        dtype = compute_dtype(problem.torch_dtype)
        weight, bias, hidden = _of_factors(problem, balanced)
        before_features = math.prod(hidden, start=weight)
        rows = weights.rsqrt() / before_features if balanced else torch.ones_like(weights)
        classes = _of_classes(problem, layout, balanced, weights.device)
        of_w: float | Tensor = problem.lambda_w * weight**2
        factors = _class_factors(problem, layout, weights.device)
        if factors is not None and classes is None:
            of_w = of_w * factors[:, None]
        penalties = Penalties(
            of_w,
            (problem.lambda_h * weights * rows**2)[:, None],
            problem.lambda_b * bias**2,
            tuple(a * s**2 for a, s in zip(problem.hidden_penalties, hidden, strict=True)),
        )
        return cls(
            problem,
            layout,
            weight,
            None if classes is None else classes.to(dtype)[:, None],
            rows.to(dtype)[:, None],
            bias,
            hidden,
            (problem.temperature * rows * before_features).to(dtype)[:, None],
            penalties.to(dtype),
            _adjustment(problem, layout, classes),
        )

    def tempered(self, problem: Problem) -> Scales:
        """The scales of the same problem on spheres at another temperature."""
        logits = self.logits * (problem.temperature / self.problem.temperature)
        return replace(
            self, problem=problem, logits=logits, adjustment=_adjustment(problem, self.layout)
        )

    @cached_property
    def even(self) -> bool:
        """Whether the logits are those of the variables as they are."""
        return bool((self.logits == 1).all())

    # ---- the model's parameters

    def from_model(self, W: Tensor, H: Tensor, b: Tensor | None, hidden: Sequence[Tensor]) -> Point:
        dtype = self.rows.dtype
        bias = None if b is None else b.to(dtype) / self.bias
        layers = tuple(V.to(dtype) / s for V, s in zip(hidden, self.hidden, strict=True))
        return Point(
            W.to(dtype) / self._classifier, H.to(dtype) / self.rows, bias, layers, self.layout
        )

    def to_model(self, x: Point) -> Point:
        layers = tuple(V * s for V, s in zip(x.hidden, self.hidden, strict=True))
        return Point(
            x.W * self._classifier, x.H * self.rows, self.model_bias(x), layers, self.layout
        )

    def model_bias(self, x: Point) -> Tensor | None:
        return x.b if x.b is None or self.bias == 1.0 else x.b * self.bias

    @property
    def _classifier(self) -> float | Tensor:
        return self.weight if self.classes is None else self.weight * self.classes

    # ---- gradients: a backend adds its sums to buffers, in the units of the logits

    def features(self, x: Point) -> Tensor:
        """The features that a backend takes: temperature and the rows' scales taken in."""
        return x.H if self.even else x.H * self.logits

    def movable(self, v: Point) -> Point:
        """A direction, zero in a frozen factor."""
        freeze = self.problem.freeze
        if freeze == "w":
            return replace(v, W=torch.zeros_like(v.W))
        return replace(v, H=torch.zeros_like(v.H)) if freeze == "h" else v

    def prefilled(self, x: Point) -> tuple[Point, Gradients]:
        """Buffers that hold the penalty's gradient at x in those units (zero in a frozen factor),
        and those of them that a head adds to.
        """
        freeze, penalties = self.problem.freeze, self.penalties
        W = torch.zeros_like(x.W) if freeze == "w" else x.W * penalties.weight
        if self.adjustment.scale is not None:
            W = W / self.adjustment.scale.to(W.dtype)[:, None]
        if freeze == "h":
            H = torch.zeros_like(x.H)
        elif self.even:
            H = x.H * (float(penalties.rows[0]) if penalties.even else penalties.rows)
        else:
            H = x.H * (penalties.rows / self.logits)
        b = None if x.b is None else x.b * (self.problem.lambda_b * self.bias)
        hidden = tuple(V * a for V, a in zip(x.hidden, penalties.hidden, strict=True))
        out = Gradients(None if freeze == "h" else H, None if freeze == "w" else W, b)
        return Point(W, H, b, hidden, self.layout), out

    def to_variables(self, sums: Point) -> None:
        """Such sums made the gradient in the solver's variables, in place."""
        if not self.even:
            sums.H.mul_(self.logits)
        if self.adjustment.scale is not None:
            sums.W.mul_(self.adjustment.scale.to(sums.W.dtype)[:, None])
        if sums.b is not None and self.bias != 1.0:
            sums.b.mul_(self.bias)


def _of_factors(problem: Problem, balanced: bool) -> tuple[float, float, tuple[float, ...]]:
    """Scales of W, of b and of the hidden layers."""
    factors = (problem.lambda_w, problem.lambda_h, *problem.hidden_penalties)
    if not balanced or not all(factors) or problem.freeze is not None:
        return 1.0, 1.0, (1.0,) * len(problem.hidden_penalties)
    weight, _, *hidden = balancing_scales(factors)
    bias = (1 + problem.lambda_b / problem.mu) ** -0.5 if problem.lambda_b > 0 else 1.0
    return weight, bias, tuple(hidden)


def _of_classes(
    problem: Problem, layout: Layout | None, balanced: bool, device: torch.device
) -> Tensor | None:
    """Scales of the rows of W beside its own, eta_k^(-1/2), float64; None where all are one."""
    factors = _class_factors(problem, layout, device)
    return factors.rsqrt() if factors is not None and balanced and not problem.freeze else None


def _adjustment(
    problem: Problem, layout: Layout | None, classes: Tensor | None = None
) -> Adjustment:
    """What is changed in the logits of the classes here, with the scales of their variables."""
    here = problem.adjustment if layout is None else problem.adjustment.part(layout.class_part)
    if classes is None:
        return here
    return replace(here, scale=classes if here.scale is None else here.scale * classes)


def _class_factors(problem: Problem, layout: Layout | None, device: torch.device) -> Tensor | None:
    """Factors on lambda_w of the classes here, float64."""
    factors = problem.classifier_factors
    if factors is None:
        return None
    return factors.to(device) if layout is None else factors[layout.class_part].to(device)
