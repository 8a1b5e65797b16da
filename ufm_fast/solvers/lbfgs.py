"""Limited-memory BFGS (Nocedal, Math. Comp. 35, 1980) with a strong Wolfe line search."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import Progress, State, rounding
from ufm_fast.solvers.curvature import Curvature, Model, curvature_of
from ufm_fast.solvers.line_search import Trial, line_search
from ufm_fast.solvers.solution import Outcome

Pair = tuple[Point, Point, float]
_LEVEL = "no step lowers value or gradient beyond rounding"


@dataclass(frozen=True)
class _Memory:
    curvature: Curvature | None = None
    pairs: tuple[Pair, ...] = ()
    model: Model | None = None
    age: int = 0
    progress: Progress = field(default_factory=Progress)


class LBFGS:
    """``history`` pairs of step and gradient change over an initial Hessian model: that of the
    curvature that serves (``precondition``; `curvature.table`), else a multiple of the identity.
    The first trial of each search is the full step.
    """

    name = "lbfgs"
    patience = 20

    def __init__(self, history: int = 10, max_steps: int = 5000, precondition: bool = True) -> None:
        self.history, self.max_steps, self.precondition = history, max_steps, precondition

    def init(self, objective: Objective, point: Point) -> State:
        curvature = curvature_of(objective) if self.precondition else None
        if curvature is None:
            return State(point, objective.value_and_grad(point), _Memory())
        point, found, model = curvature.begin(objective, point)
        return State(point, found, _Memory(curvature, (), model))

    def step(self, objective: Objective, state: State) -> State:
        state = self._refresh(objective, state)
        memory: _Memory = state.memory
        gradient = state.evaluation.gradient
        direction = _direction(gradient, memory)
        slope = gradient.dot(direction)
        if not slope < 0:
            memory = _Memory(memory.curvature)
            direction = gradient.scale(-1.0)
            slope = gradient.dot(direction)
        if not slope < 0:
            return State(
                state.point,
                state.evaluation,
                memory,
                Outcome.STALLED,
                "the gradient is zero to rounding",
            )
        scaled = bool(memory.pairs) or memory.model is not None
        first = 1.0 if scaled else min(1.0, max(state.point.norm(), 1.0) / (-slope) ** 0.5)
        origin = Trial(0.0, state.evaluation.value, slope, state.point, state.evaluation)
        found = line_search(
            objective, origin, direction, first, rounding(objective, state.evaluation.value)
        )
        if found is None:
            if memory.pairs:  # the model may be stale: once more without it
                return State(state.point, state.evaluation, replace(memory, pairs=()))
            return State(state.point, state.evaluation, memory, Outcome.STALLED, _LEVEL)
        if objective.geometry.curved:
            pairs, s, y = _carried(objective, state.point, direction, found, gradient, memory.pairs)
        else:
            pairs, s = memory.pairs, found.point.axpy(-1.0, state.point)
            y = found.evaluation.gradient.axpy(-1.0, gradient)
        sy = s.dot(y)
        size = y.norm()  # zero where its squares are below float32
        if size > 0 and sy > 1e-14 * s.norm() * size:
            pairs = (*pairs, (s, y, sy))[-self.history :]
        progress = memory.progress.update(
            objective, found.evaluation, found.evaluation.gradient.norm()
        )
        memory = replace(memory, pairs=pairs, age=memory.age + 1, progress=progress)
        if progress.idle > self.patience:
            return State(found.point, found.evaluation, memory, Outcome.STALLED, _LEVEL)
        return State(found.point, found.evaluation, memory)

    def _refresh(self, objective: Objective, state: State) -> State:
        """Bring the preconditioner to the point now and then; early steps change the curvatures
        most.
        """
        memory: _Memory = state.memory
        built = memory.model is not None
        if memory.curvature is None or not memory.curvature.due(memory.age, built=built):
            return state
        point, found, model = memory.curvature.build(objective, state.point, state.evaluation)
        pairs = (
            memory.pairs if point is state.point else ()
        )  # pairs of another gauge say nothing here
        return State(point, found, replace(memory, pairs=pairs, model=model))


def _carried(
    objective: Objective,
    x: Point,
    direction: Point,
    found: Trial,
    gradient: Point,
    pairs: tuple[Pair, ...],
) -> tuple[tuple[Pair, ...], Point, Point]:
    """Pairs, step and change of the gradient as tangents at the new point: parallel transport keeps
    inner products.
    """

    def carry(v: Point) -> Point:
        return objective.carry(x, direction, found.t, v)

    carried = tuple((carry(s), carry(y), sy) for s, y, sy in pairs)
    return (
        carried,
        carry(direction.scale(found.t)),
        found.evaluation.gradient.axpy(-1.0, carry(gradient)),
    )


def _direction(gradient: Point, memory: _Memory) -> Point:
    """Two-loop recursion: minus the inverse Hessian model times the gradient."""
    pairs, model = memory.pairs, memory.model
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
    """x += factor v in place: the recursion runs over the whole history, and copies would double
    its traffic.
    """
    for left, right in zip(x.parts(), v.parts(), strict=True):
        left.add_(right, alpha=factor)
