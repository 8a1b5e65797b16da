"""The objective in the variables a solver works in: the only place where lambda, 1/N and the scaling are decided."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from ufm_fast.backends import Backend, Gradients, HeadInput, RowStatistics, TiledBackend
from ufm_fast.backends.base import compute_dtype
from ufm_fast.backends.squared_error import by_residuals
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.losses import SquaredError
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.targets import Rows

VARIABLES = ("balanced", "raw")
_Method = TypeVar("_Method", bound=Callable[..., Any])


@dataclass(frozen=True)
class Evaluation:
    """Value of the objective at a point, its data term, its gradient there, and row statistics where asked for."""

    value: float
    data_value: float
    gradient: Point
    statistics: RowStatistics | None = None


def _exact(method: _Method) -> _Method:
    """The method without autocast, under which products would be rounded to half precision."""

    @wraps(method)
    def run(self: Objective, *given: Any, **named: Any) -> Any:
        with torch.autocast(torch.device(self.problem.device).type, enabled=False):
            return method(self, *given, **named)

    return cast("_Method", run)


class Objective:
    """f and its derivatives over the rows of a problem.

    Solver variables x = (B, A, c) relate to the model's by  W = weight_scale B,  h_r = row_scale_r a_r,  b = bias_scale c.
    With ``variables='balanced'``  weight_scale = (lambda_h/lambda_w)^(1/4),  row_scale_r = 1/(weight_scale sqrt(n_r))  and
    bias_scale = (1 + lambda_b/mu)^(-1/2),  so that

        f = sum_r (n_r/N) l(B a_r / sqrt(n_r) + b, y_r) + mu/2 (|A|^2 + |B|^2) + mu lambda_b / (mu + lambda_b) |c|^2 / 2

    with mu = sqrt(lambda_w lambda_h), which is the same function, far better conditioned when counts or penalties differ.
    'raw' has all scales 1.
    ``reduce='classes'`` has one row for each class (exact); 'none' a row for each sample; 'auto' is 'classes'.
    Parameters are kept in float32 where the problem's dtype is bfloat16, and rounded to it before each product.
    """

    def __init__(
        self, problem: Problem, *, backend: Backend | None = None, reduce: str = "auto", variables: str = "balanced"
    ) -> None:
        if not isinstance(problem, Problem):
            raise InputTypeError(f"problem must be a Problem, got {type(problem).__name__}")
        if variables not in VARIABLES:
            raise InputError(f"variables must be one of {', '.join(VARIABLES)}; got {variables!r}")
        self.problem = problem
        self.backend: Backend = TiledBackend() if backend is None else backend
        self.reduce = problem.reduction(reduce)
        self.variables = variables
        self.rows: Rows = problem.rows(self.reduce)
        device = torch.device(problem.device)
        self.dtype = compute_dtype(problem.torch_dtype)
        self.targets = self.rows.targets.to(device)
        counts = self.rows.counts.to(device=device, dtype=torch.float64)
        self.row_weight = counts / problem.num_samples
        balance = problem.lambda_w > 0 and problem.lambda_h > 0 and problem.freeze is None and variables == "balanced"
        self.weight_scale = (problem.lambda_h / problem.lambda_w) ** 0.25 if balance else 1.0
        row_scale = counts.rsqrt() / self.weight_scale if variables == "balanced" else torch.ones_like(counts)
        self.bias_scale = (1 + problem.lambda_b / problem.mu) ** -0.5 if balance and problem.lambda_b > 0 else 1.0
        self.row_scale = row_scale.to(self.dtype)[:, None]
        self.weight_penalty = problem.lambda_w * self.weight_scale**2
        penalty = problem.lambda_h * counts * row_scale**2
        self._even = bool((penalty == penalty[0]).all())
        self.row_penalty = penalty.to(self.dtype)[:, None]
        self.bias_penalty = problem.lambda_b * self.bias_scale**2
        self.logit_scale = (row_scale * self.weight_scale).to(self.dtype)[:, None]
        self._logit_even = bool((self.logit_scale == 1).all())
        self.evaluations = 0.0

    # ---- maps between the solver's variables and the model's ---------------------------------------------------------

    def from_model(self, W: Tensor, H: Tensor, b: Tensor | None) -> Point:
        """Solver variables of a model point with one feature row for each row of the problem."""
        bias = None if b is None else b.to(self.dtype) / self.bias_scale
        return Point(W.to(self.dtype) / self.weight_scale, H.to(self.dtype) / self.row_scale, bias)

    def to_model(self, x: Point) -> Point:
        """(W, H, b) with one feature row for each row of the problem."""
        return Point(x.W * self.weight_scale, x.H * self.row_scale, self.bias(x))

    def bias(self, x: Point) -> Tensor | None:
        """The model's bias at solver variables x."""
        return x.b if x.b is None or self.bias_scale == 1.0 else x.b * self.bias_scale

    def lift(self, x: Point) -> Point:
        """(W, H, b) with one feature row for each of the N samples."""
        model = self.to_model(x)
        if self.reduce == "none":
            return model
        return Point(model.W, model.H.index_select(0, self.problem.sample_row().to(model.H.device)), model.b)

    # ---- value and derivatives ---------------------------------------------------------------------------------------

    def head_input(self, x: Point) -> HeadInput:
        """The data term's input: features scaled so that the logits are features @ B' + b."""
        features = x.H if self._logit_even else x.H * self.logit_scale
        W, dtype = x.W, self.problem.torch_dtype
        if dtype != self.dtype:
            features, W = features.to(dtype), W.to(dtype)
        return HeadInput(self.problem.loss, features, W, self.bias(x), self.targets, self.row_weight)

    @_exact
    def value_and_grad(self, x: Point, *, statistics: bool = False) -> Evaluation:
        """f(x) and its gradient in the solver's variables (zero in a frozen factor)."""
        self.evaluations += 1
        gradient, out = self._prefilled(x)
        result = self.backend.head(self.head_input(x), out, statistics=statistics)
        self._unscale(gradient)
        data = float(result.value)
        return Evaluation(data + self.penalty(x), data, gradient, result.statistics)

    @_exact
    def hvp(self, x: Point, v: Point) -> Point:
        """Hessian of f at x times v. Counts as two gradient evaluations."""
        self.evaluations += 2
        if self.problem.freeze is not None:
            v = Point(v.W.new_zeros(v.W.shape) if self.problem.freeze == "w" else v.W,
                      v.H.new_zeros(v.H.shape) if self.problem.freeze == "h" else v.H, v.b)  # fmt: skip
        product, out = self._prefilled(v)
        self.backend.head_hvp(self.head_input(x), self.head_input(v), out)
        self._unscale(product)
        return product

    @_exact
    def penalty(self, x: Point) -> float:
        """lambda terms of f, in float64."""
        total = 0.5 * self.weight_penalty * Point(x.W, x.W[:0]).dot(Point(x.W, x.W[:0]))
        if self._even:
            total += 0.5 * float(self.row_penalty[0]) * Point(x.H, x.H[:0]).dot(Point(x.H, x.H[:0]))
        else:
            squares = torch.linalg.vecdot(x.H, x.H).double()
            total += 0.5 * float(squares @ self.row_penalty[:, 0].double())
        if x.b is not None and self.bias_penalty:
            total += 0.5 * self.bias_penalty * float(x.b.double() @ x.b.double())
        return total

    def _prefilled(self, x: Point) -> tuple[Point, Gradients]:
        """Buffers that hold lambda times the parameter, in the units that the backend adds its sums in."""
        freeze = self.problem.freeze
        W = torch.zeros_like(x.W) if freeze == "w" else x.W * self.weight_penalty
        if freeze == "h":
            H = torch.zeros_like(x.H)
        elif self._logit_even:
            H = x.H * (float(self.row_penalty[0]) if self._even else self.row_penalty)
        else:
            H = x.H * (self.row_penalty / self.logit_scale)
        b = None if x.b is None else x.b * (self.problem.lambda_b * self.bias_scale)  # in the units of the sums
        out = Gradients(None if freeze == "h" else H, None if freeze == "w" else W, b)
        return Point(W, H, b), out

    def _unscale(self, gradient: Point) -> None:
        if not self._logit_even:
            gradient.H.mul_(self.logit_scale)
        if gradient.b is not None and self.bias_scale != 1.0:
            gradient.b.mul_(self.bias_scale)

    @cached_property
    def value_floor(self) -> float:
        """Absolute rounding error of the value beside its relative one: squared error's where it is a difference of Grams."""
        problem = self.problem
        if isinstance(problem.loss, SquaredError):
            exact = by_residuals(self.targets, problem.num_classes, problem.dim, bias=problem.bias != "none")
            return 0.0 if exact else 1e-15
        return 0.0

    # ---- scales that stopping rules compare with ----------------------------------------------------------------------

    def gradient_scale(self, x: Point) -> float:
        """max(lambda_w |W| + lambda_h |H|, mu) in the solver's variables: what a gradient norm is small against."""
        weights = self.weight_penalty * math.sqrt(Point(x.W, x.W[:0]).dot(Point(x.W, x.W[:0])))
        features = float(torch.linalg.vector_norm((x.H * self.row_penalty).double())) if not self._even else (
            float(self.row_penalty[0]) * math.sqrt(Point(x.H, x.H[:0]).dot(Point(x.H, x.H[:0]))))  # fmt: skip
        return max(weights + features, self.problem.mu, 1e-300)
