"""Squared error by alternating exact least squares: each factor's minimiser given the other, by one
d x d Cholesky.

On several ranks Gram matrices and means are summed over them, and rows of W that are targets of
rows elsewhere, and the sums of those rows, are exchanged as in the squared error itself
(`backends.exchange`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.base import LogitGradient
from ufm_fast.backends.exchange import home_of
from ufm_fast.backends.gram import gram
from ufm_fast.backends.home import Home
from ufm_fast.backends.sums import weighted_sum
from ufm_fast.dense_targets import DenseTargets
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import State, rounding
from ufm_fast.solvers.solution import Outcome


class Alternating:
    """One step: H given (W, b), then (W, b) given H, both exact (Carroll and Chang's alternating
    least squares).

    With weights o_r = n_r / N of the rows and lambda_r = lambda_h of row r (both in the solver's
    variables):
    h_r = (o_r W'W + lambda_r I)^-1 o_r W'(e_y - b);  (W, b) solves the ridge regression of the
    one-hot targets on (H, 1). Rows with different o_r share one eigendecomposition of W'W.
    """

    name = "alternating"

    def __init__(self, max_steps: int = 5000) -> None:
        self.max_steps = max_steps

    def init(self, objective: Objective, point: Point) -> State:
        return State(point, objective.value_and_grad(point))

    def step(self, objective: Objective, state: State) -> State:
        x, freeze = state.point, objective.problem.freeze
        if freeze != "h":
            x = replace(x, H=self._features(objective, x))
        x = self._classifier(objective, x) if freeze != "w" else self._bias(objective, x)
        found = objective.value_and_grad(x)
        level = found.value >= state.evaluation.value - 1e-2 * rounding(objective, found.value)
        if level and found.gradient.norm() >= state.evaluation.gradient.norm():
            return State(
                state.point,
                state.evaluation,
                None,
                Outcome.STALLED,
                "no step lowers value or gradient",
            )
        return State(x, found)

    @staticmethod
    def _features(objective: Objective, x: Point) -> Tensor:
        weight = objective.row_weight[:, None].to(x.W.dtype)
        scale = objective.scales.logits
        home = _home(objective)
        values, vectors = torch.linalg.eigh(home.total(gram(x.W)))
        values, vectors = values.clamp_min(0.0).to(x.W.dtype), vectors.to(x.W.dtype)
        right = _targets_times(objective, x)
        if (b := objective.scales.model_bias(x)) is not None:
            right = right - home.total(b @ x.W)
        rotated = (right @ vectors) * (weight * scale)
        features: Tensor = (
            rotated / (weight * scale.square() * values + objective.scales.penalties.rows)
        ) @ vectors.T
        return features

    @staticmethod
    def _classifier(objective: Objective, x: Point) -> Point:
        problem, weight, home = objective.problem, objective.row_weight, _home(objective)
        H = x.H * objective.scales.logits
        S = home.total(gram(H, weight)) + objective.scales.penalties.weight * torch.eye(
            H.shape[1], dtype=torch.float64, device=H.device
        )
        C = _class_sums(objective, x, H)
        factor = torch.linalg.cholesky(S)
        if x.b is None:
            return replace(x, W=_solve_rows(C, factor))
        # W = (C - b m') S^-1 put into the equation of b: (1 + lambda_b - m'S^-1 m) b = v - C S^-1
        # m, with sum o = 1.
        m = home.total(weighted_sum(H, weight))
        v = _shares(objective, x)
        Sm = torch.cholesky_solve(m[:, None], factor)[:, 0]
        b = ((v - C.double() @ Sm) / (1.0 + problem.lambda_b - m @ Sm)).to(x.b.dtype)
        W = _solve_rows(C.addr_(b, m.to(C.dtype), alpha=-1), factor)
        return replace(x, W=W, b=b / objective.scales.bias)

    @staticmethod
    def _bias(objective: Objective, x: Point) -> Point:
        if x.b is None:
            return x
        m = ((x.H * objective.scales.logits).double() * objective.row_weight[:, None]).sum(0)
        m, v = _home(objective).total(m), _shares(objective, x)
        b = (v - x.W.double() @ m) / (1.0 + objective.problem.lambda_b)
        return replace(x, b=(b / objective.scales.bias).to(x.b.dtype))


def _home(objective: Objective) -> Home:
    """Where the rows of W are that rows of H have as targets."""
    return home_of(objective.targets, objective.layout)


def _at_zero(objective: Objective, x: Point) -> LogitGradient:
    """-diag(o) Y as an operator: the gradient in the logits where they are zero."""
    return objective.backend.logit_gradient(objective.head_input(x.zeros()))


def _targets_times(objective: Objective, x: Point) -> Tensor:
    """Y W of the rows' targets: of labels rows of W."""
    if isinstance(objective.targets, DenseTargets):
        return _at_zero(objective, x).times(x.W) / -objective.row_weight[:, None].to(x.W.dtype)
    return _home(objective).rows(x.W)(slice(None))


def _class_sums(objective: Objective, x: Point, H: Tensor) -> Tensor:
    """Y' diag(o) H, a row for each of W."""
    if isinstance(objective.targets, DenseTargets):
        return -_at_zero(objective, x).transposed_times(H)
    total, home = H.new_zeros(len(x.W), H.shape[1]), _home(objective)
    home.add(total, slice(None), H, objective.row_weight)
    home.settle(total)
    return total


def _shares(objective: Objective, x: Point) -> Tensor:
    """Y' o, float64, an entry for each row of W: the mean of the targets."""
    weight = objective.row_weight
    if isinstance(objective.targets, DenseTargets):
        return -_at_zero(objective, x).transposed_times(torch.ones_like(weight)[:, None])[:, 0]
    return _home(objective).totals(len(x.W), weight)


def _solve_rows(C: Tensor, factor: Tensor) -> Tensor:
    """C S^-1 from the Cholesky factor of S, in float64 by blocks of rows; C is overwritten."""
    for rows in torch.split(C, 1 << 13):
        rows.copy_(torch.cholesky_solve(rows.double().T, factor).T)
    return C
