"""Limited-memory BFGS (Nocedal, Math. Comp. 35, 1980) with a strong Wolfe line search."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers import gauss_newton, pairing
from ufm_fast.solvers.base import Progress, State, rounding
from ufm_fast.solvers.line_search import Trial, line_search
from ufm_fast.solvers.solution import Outcome

Pair = tuple[Point, Point, float]
_LEVEL = "no step lowers value or gradient beyond rounding"


@dataclass(frozen=True)
class _Memory:
    pairs: tuple[Pair, ...] = ()
    preconditioner: pairing.PairPreconditioner | gauss_newton.Model | None = None
    age: int = 0
    progress: Progress = field(default_factory=Progress)


class LBFGS:
    """``history`` pairs of step and gradient change over an initial Hessian model: that of ``pairing`` or ``gauss_newton``
    where it applies (``precondition``), else a multiple of the identity. The first trial of each search is the full step.
    """

    name = "lbfgs"
    patience = 20

    def __init__(self, history: int = 10, max_steps: int = 5000, precondition: bool = True) -> None:
        self.history, self.max_steps, self.precondition = history, max_steps, precondition

    def init(self, objective: Objective, point: Point) -> State:
        if self.precondition and gauss_newton.at_once(objective):
            return State(point, objective.value_and_grad(point), _Memory((), gauss_newton.build(objective, point)))
        if not (self.precondition and pairing.applicable(objective)):
            return State(point, objective.value_and_grad(point), _Memory())
        found = objective.value_and_grad(point, statistics=True)
        assert found.statistics is not None
        if bool((found.statistics.margin <= 0).any()):  # not yet separating: look for the subspaces first
            point, found = pairing.lifted_step(objective, point, found)
        point = pairing.fix_gauge(point)
        found = objective.value_and_grad(point, statistics=True)
        return State(point, found, _Memory((), pairing.PairPreconditioner.build(objective, point, found)))

    def step(self, objective: Objective, state: State) -> State:
        state = self._refresh(objective, state)
        memory: _Memory = state.memory
        gradient = state.evaluation.gradient
        direction = _direction(gradient, memory)
        slope = gradient.dot(direction)
        if not slope < 0:
            memory = _Memory()
            direction = gradient.scale(-1.0)
            slope = gradient.dot(direction)
        if not slope < 0:
            return State(state.point, state.evaluation, memory, Outcome.STALLED, "the gradient is zero to rounding")
        scaled = bool(memory.pairs) or memory.preconditioner is not None
        first = 1.0 if scaled else min(1.0, max(state.point.norm(), 1.0) / (-slope) ** 0.5)
        origin = Trial(0.0, state.evaluation.value, slope, state.point, state.evaluation)
        found = line_search(objective.value_and_grad, origin, direction, first, rounding(objective, state.evaluation.value))
        if found is None:
            if memory.pairs:  # the model may be stale: once more without it
                return State(state.point, state.evaluation, replace(memory, pairs=()))
            return State(state.point, state.evaluation, memory, Outcome.STALLED, _LEVEL)
        s = found.point.axpy(-1.0, state.point)
        y = found.evaluation.gradient.axpy(-1.0, gradient)
        sy = s.dot(y)
        pairs = memory.pairs
        if sy > 1e-14 * s.norm() * y.norm():
            pairs = (*pairs, (s, y, sy))[-self.history :]
        progress = memory.progress.update(objective, found.evaluation, found.evaluation.gradient.norm())
        memory = replace(memory, pairs=pairs, age=memory.age + 1, progress=progress)
        if progress.idle > self.patience:
            return State(found.point, found.evaluation, memory, Outcome.STALLED, _LEVEL)
        return State(found.point, found.evaluation, memory)

    def _refresh(self, objective: Objective, state: State) -> State:
        """Bring the preconditioner to the point now and then; early steps change the curvatures most."""
        memory, found = state.memory, state.evaluation
        if memory.preconditioner is None:
            due = self.precondition and memory.age == gauss_newton.LATER and gauss_newton.later(objective)
        else:
            due = memory.preconditioner.due(memory.age)
        if not due:
            return state
        if isinstance(memory.preconditioner, pairing.PairPreconditioner):
            if found.statistics is None:
                found = objective.value_and_grad(state.point, statistics=True)
            model: pairing.PairPreconditioner | gauss_newton.Model | None
            model = pairing.PairPreconditioner.build(objective, state.point, found)
            return replace(state, memory=replace(memory, preconditioner=model))
        point, found, model = gauss_newton.start(objective, state.point, found, lower=False)
        pairs = memory.pairs if point is state.point else ()  # pairs of another gauge say nothing here
        return State(point, found, replace(memory, pairs=pairs, preconditioner=model))


def _direction(gradient: Point, memory: _Memory) -> Point:
    """Two-loop recursion: minus the inverse Hessian model times the gradient."""
    pairs, model = memory.pairs, memory.preconditioner
    q = gradient.scale(-1.0)
    alphas: list[float] = []
    for s, y, sy in reversed(pairs):
        alpha = s.dot(q) / sy
        alphas.append(alpha)
        _add(q, -alpha, y)
    if model is not None:
        q = model.apply(q)
    if pairs:
        _, y, sy = pairs[-1]
        factor = sy / (y.dot(y) if model is None else y.dot(model.apply(y)))
        for part in q.parts():
            part.mul_(factor)
    for (s, y, sy), alpha in zip(pairs, reversed(alphas), strict=True):
        _add(q, alpha - y.dot(q) / sy, s)
    return q


def _add(x: Point, factor: float, v: Point) -> None:
    """x += factor v in place: the recursion runs over the whole history, and copies would double its traffic."""
    for left, right in zip(x.parts(), v.parts(), strict=True):
        left.add_(right, alpha=factor)
