"""Trust-region Newton with truncated conjugate gradients (Steihaug, SIAM J. Numer. Anal. 20, 1983).

Decisions

2026-11-26. Newton-CG may take 1,000 products in a step, not 250, which cut some steps off; most
stop long before, by their residual. Within the value's rounding a step is judged by the gradient,
and now also taken where the value's change is the model's within a fifth: for want of that such
problems ended with gaps of 1e-7.

2026-11-26. Newton-CG is stalled only where its model promises no more than rounding. Six rejected
radii in a row were taken for a stall, and a squared error with penalties of 1e-10 ended 4 % above
its minimum (`tests/solvers/test_methods.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import State, rounding
from ufm_fast.solvers.curvature import curvature_of
from ufm_fast.solvers.curvature.base import Built
from ufm_fast.solvers.solution import Outcome


@dataclass(frozen=True)
class _Trust:
    radius: float
    failures: int = 0


Inverse = Callable[[Point], Point]


class NewtonCG:
    """Hessian products only. The residual is asked to fall by min(1/2, |g|^(1/2)/|g_0|^(1/2)):
    superlinear at the end.
    """

    name = "newton-cg"

    def __init__(self, max_steps: int = 500, max_inner: int = 1000, residual: float = 0.1) -> None:
        self.max_steps, self.max_inner, self.residual = max_steps, max_inner, residual

    def init(self, objective: Objective, point: Point) -> State:
        evaluation = objective.value_and_grad(point)
        return State(point, evaluation, _Trust(max(point.norm(), 1.0)))

    def step(self, objective: Objective, state: State) -> State:
        trust: _Trust = state.memory
        point, evaluation, built = _preconditioned(objective, state)
        state = State(point, evaluation, trust)
        gradient = evaluation.gradient
        size = gradient.norm()
        if size == 0.0:
            return State(
                state.point, state.evaluation, trust, Outcome.STALLED, "the gradient is zero"
            )
        relative = min(self.residual, math.sqrt(size / objective.gradient_scale(state.point)))
        inverse = _same if built is None else built.apply
        p, model = _subproblem(
            objective, state.point, gradient, inverse, trust.radius, relative, self.max_inner
        )
        candidate = objective.move(state.point, p)
        found = objective.value_and_grad(candidate)
        noise = rounding(objective, state.evaluation.value)
        ratio = _agreement(state.evaluation, found, model, noise)
        length = p.norm()
        radius = trust.radius
        if ratio < 0.25:
            radius = 0.25 * length
        elif ratio > 0.75 and length > 0.9 * trust.radius:
            radius = 2.0 * trust.radius
        if ratio > 0.1:
            return State(candidate, found, _Trust(radius))
        # Where the model still promises more than rounding, a failure says only that the radius is
        # too large.
        if (trust.failures >= 5 and abs(model) <= noise) or radius < 1e-14 * max(
            state.point.norm(), 1e-300
        ):
            return State(
                state.point,
                state.evaluation,
                trust,
                Outcome.STALLED,
                "no step lowers value or gradient",
            )
        return State(state.point, state.evaluation, _Trust(radius, trust.failures + 1))


def _preconditioned(objective: Objective, state: State) -> Built:
    """The model of the curvature that serves Newton steps, and where it is built; without one the
    point as it is.
    """
    row = curvature_of(objective)
    if row is None or not row.newton:
        return Built(state.point, state.evaluation, None)
    return row.build(objective, state.point, state.evaluation, lower=True)


def _subproblem(
    objective: Objective,
    x: Point,
    gradient: Point,
    inverse: Inverse,
    radius: float,
    relative: float,
    most: int,
) -> tuple[Point, float]:
    """Minimise g'p + p'Hp/2 within the radius, until the residual has fallen to ``relative`` of the
    gradient.

    ``inverse``: the preconditioner. Returns p and the model's decrease (< 0).
    """
    p, r, model = x.zeros(), gradient, 0.0
    y = inverse(r)
    direction, square = y.scale(-1.0), r.dot(y)
    target = relative * gradient.norm()
    for _ in range(most):
        Hd = objective.hvp(x, direction)
        curvature = direction.dot(Hd)
        alpha = square / curvature if curvature > 0 else math.inf
        along, length, now = p.dot(direction), direction.dot(direction), p.dot(p)
        if not now + 2 * alpha * along + alpha * alpha * length < radius * radius:
            tau = (
                -along + math.sqrt(max(along * along + length * (radius * radius - now), 0.0))
            ) / length
            model += tau * (r.dot(direction)) + 0.5 * tau * tau * curvature
            return p.axpy(tau, direction), model
        p = p.axpy(alpha, direction)
        model -= 0.5 * alpha * square
        r = r.axpy(alpha, Hd)
        if r.norm() <= target:
            break
        y = inverse(r)
        fresh = r.dot(y)
        direction = direction.scale(fresh / square).axpy(-1.0, y)
        square = fresh
    return p, model


def _same(g: Point) -> Point:
    return g


def _agreement(old: Evaluation, new: Evaluation, model: float, noise: float) -> float:
    """Actual over predicted decrease. Within rounding of the value the gradient's norm is the
    judge, and what the value says counts only where it is the model's, within a fifth.
    """
    if not math.isfinite(new.value):
        return -1.0
    ratio = (new.value - old.value) / model if model < 0 else -1.0
    if abs(new.value - old.value) > noise or abs(model) > noise:
        return ratio
    if new.gradient.norm() < 0.9 * old.gradient.norm():
        return 1.0
    return ratio if 0.8 < ratio < 1.25 else -1.0
