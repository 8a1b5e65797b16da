"""Nonlinear conjugate gradients (Polak and Ribiere, with restarts; on spheres as Absil, Mahony and
Sepulchre, section 8.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import Progress, State, rounding
from ufm_fast.solvers.line_search import Trial, line_search
from ufm_fast.solvers.solution import Outcome


@dataclass(frozen=True)
class _Memory:
    direction: Point | None = None  # of the last step, carried to where it ended
    gradient: Point | None = None  # of the point before, carried likewise
    step: float | None = None
    slope: float = 0.0
    progress: Progress = field(default_factory=Progress)


class ConjugateGradient:
    """d <- -g + max(0, <g, g - g'> / <g', g'>) d', with a strong Wolfe line search: two vectors of
    memory.

    g' and d' are the gradient and direction before, transported. Without descent along d the
    direction is -g again.
    """

    name = "cg"
    patience = 50

    def __init__(self, max_steps: int = 20000) -> None:
        self.max_steps = max_steps

    def init(self, objective: Objective, point: Point) -> State:
        return State(point, objective.value_and_grad(point), _Memory())

    def step(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        g, direction = state.evaluation.gradient, state.evaluation.gradient.scale(-1.0)
        if memory.direction is not None and memory.gradient is not None:
            before = memory.gradient.dot(memory.gradient)
            beta = max(0.0, (g.dot(g) - g.dot(memory.gradient)) / before) if before > 0 else 0.0
            direction = direction.axpy(beta, memory.direction)
        slope = g.dot(direction)
        if not slope < 0:
            direction, slope = g.scale(-1.0), -g.dot(g)
        if not slope < 0:
            return State(
                state.point,
                state.evaluation,
                memory,
                Outcome.STALLED,
                "the gradient is zero to rounding",
            )
        # The step whose first-order change is that of the last one.
        first = (
            memory.step * memory.slope / slope
            if memory.step
            else min(1.0, max(state.point.norm(), 1.0) / (-slope) ** 0.5)
        )
        origin = Trial(0.0, state.evaluation.value, slope, state.point, state.evaluation)
        found = line_search(
            objective, origin, direction, first, rounding(objective, state.evaluation.value)
        )
        if found is None:
            if memory.direction is not None:  # once more along the gradient
                return State(state.point, state.evaluation, _Memory(progress=memory.progress))
            return State(
                state.point,
                state.evaluation,
                memory,
                Outcome.STALLED,
                "no step lowers value or gradient",
            )
        progress = memory.progress.update(
            objective, found.evaluation, found.evaluation.gradient.norm()
        )
        along, before_g = (
            objective.carry(state.point, direction, found.t, v) for v in (direction, g)
        )
        fresh = _Memory(along, before_g, found.t, slope, progress)
        if progress.idle > self.patience:
            return State(
                found.point,
                found.evaluation,
                fresh,
                Outcome.STALLED,
                "neither value nor gradient fall any more",
            )
        return State(found.point, found.evaluation, fresh)
