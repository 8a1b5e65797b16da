"""Squared error by alternating exact least squares: each factor's minimiser given the other, by one
d x d Cholesky.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ufm_fast.backends.gram import gram
from ufm_fast.backends.sums import add_class_sums, weighted_sum
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
            x = Point(x.W, self._features(objective, x), x.b)
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
        values, vectors = torch.linalg.eigh(gram(x.W))
        values, vectors = values.clamp_min(0.0).to(x.W.dtype), vectors.to(x.W.dtype)
        right = _targets_times(objective, x.W)
        if (b := objective.scales.model_bias(x)) is not None:
            right = right - b @ x.W
        rotated = (right @ vectors) * (weight * scale)
        features: Tensor = (
            rotated / (weight * scale.square() * values + objective.scales.penalties.rows)
        ) @ vectors.T
        return features

    @staticmethod
    def _classifier(objective: Objective, x: Point) -> Point:
        problem, weight = objective.problem, objective.row_weight
        H = x.H * objective.scales.logits
        S = gram(H, weight) + objective.scales.penalties.weight * torch.eye(
            H.shape[1], dtype=torch.float64, device=H.device
        )
        C = _class_sums(objective, H)
        factor = torch.linalg.cholesky(S)
        if x.b is None:
            return Point(_solve_rows(C, factor), x.H, None)
        # W = (C - b m') S^-1 put into the equation of b: (1 + lambda_b - m'S^-1 m) b = v - C S^-1
        # m, with sum o = 1.
        m = weighted_sum(H, weight)
        v = _shares(objective)
        Sm = torch.cholesky_solve(m[:, None], factor)[:, 0]
        b = ((v - C.double() @ Sm) / (1.0 + problem.lambda_b - m @ Sm)).to(x.b.dtype)
        return Point(
            _solve_rows(C.addr_(b, m.to(C.dtype), alpha=-1), factor), x.H, b / objective.scales.bias
        )

    @staticmethod
    def _bias(objective: Objective, x: Point) -> Point:
        if x.b is None:
            return x
        weight = objective.row_weight
        m = ((x.H * objective.scales.logits).double() * weight[:, None]).sum(0)
        v = _shares(objective)
        b = (v - x.W.double() @ m) / (1.0 + objective.problem.lambda_b)
        return Point(x.W, x.H, (b / objective.scales.bias).to(x.b.dtype))


def _targets_times(objective: Objective, W: Tensor) -> Tensor:
    """Y W of the rows' targets: of labels rows of W."""
    targets = objective.targets
    if isinstance(targets, DenseTargets):
        return (targets.values @ W.double()).to(W.dtype)
    return W.index_select(0, targets.indices)


def _class_sums(objective: Objective, H: Tensor) -> Tensor:
    """Y' diag(o) H, K x d."""
    targets, weight = objective.targets, objective.row_weight
    if isinstance(targets, DenseTargets):
        return (targets.values.T @ (H.double() * weight[:, None])).to(H.dtype)
    total = H.new_zeros(objective.problem.num_classes, H.shape[1])
    add_class_sums(total, targets.indices, H, weight)
    return total


def _shares(objective: Objective) -> Tensor:
    """Y' o, float64 (K,): the mean of the targets."""
    targets, weight = objective.targets, objective.row_weight
    if isinstance(targets, DenseTargets):
        return weight @ targets.values
    return weight.new_zeros(objective.problem.num_classes).index_add_(0, targets.indices, weight)


def _solve_rows(C: Tensor, factor: Tensor) -> Tensor:
    """C S^-1 from the Cholesky factor of S, in float64 by blocks of rows; C is overwritten."""
    for rows in torch.split(C, 1 << 13):
        rows.copy_(torch.cholesky_solve(rows.double().T, factor).T)
    return C
