"""The one loop that every solver runs under.

Decisions

2026-11-25. Stopping. Converged: |grad| <= tol max(lambda_w |W| + lambda_h |H|, mu) in the solver's
variables, tol 1e-10. A gradient at eps times that scale, or no progress of value (beyond rounding)
or gradient (by a tenth) for a while, is the outcome `stalled`: a success of its own kind, for the
method gets no further in that dtype (Newton-CG, judged by the gradient, may still). No progress
alone is not enough, for steps of 1e-16 make none either: the best step along the gradient, |g|^2 /
2L with L the largest curvature, must be lost in the value's rounding, or the gradient be what
rounding makes of it, a few L |x| eps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import (
    Progress,
    Solver,
    State,
    gradient_floor,
    largest_curvature,
    rounding,
)
from ufm_fast.solvers.solution import Outcome, StepRecord

OnLog = Callable[[StepRecord, Point], None]
OnStep = Callable[[int, float, float], None]
Measure = Callable[[Point, float], Mapping[str, float]]
Ended = tuple[Outcome, str]
#: Seconds between calls of ``on_save``, or twenty times what the last one took, where that is more.
SAVE_SECONDS = 10.0
_INTERRUPTED = Outcome.INTERRUPTED, "interrupted; resume to go on"


@dataclass
class Run:
    """What the loop leaves behind: the last state, counts, and the history of log points."""

    state: State
    steps: int
    seconds: float
    outcome: Outcome
    message: str
    history: list[StepRecord] = field(default_factory=list)


def log_spaced(first: int = 1, per_decade: int = 20) -> Iterator[int]:
    """Steps 0, 1, 2, ... then ``per_decade`` a decade, without end: the field's custom for log
    points.
    """
    last = -1
    exponent = 0
    yield 0
    while True:
        step = round(first * 10 ** (exponent / per_decade))
        exponent += 1
        if step > last:
            last = step
            yield step


def minimise(
    objective: Objective,
    solver: Solver,
    point: Point,
    *,
    tol: float,
    max_steps: int | None = None,
    log_points: Iterator[int] | None = None,
    on_log: OnLog | None = None,
    on_save: OnLog | None = None,
    on_step: OnStep | None = None,
    measure: Measure | None = None,
    first_step: int = 0,
    previous_seconds: float = 0.0,
) -> Run:
    """Step until |grad| <= tol max(lambda_w |W| + lambda_h |H|, mu), in the solver's variables, or
    until the solver stops.

    ``max_steps`` counts this run's steps; ``first_step`` and ``previous_seconds`` continue an
    earlier run's numbering. Ctrl-C ends the loop with the last state and the outcome
    ``interrupted``. ``on_save`` gets the state from time to time, by the clock, and when an error
    ends the loop; ``on_step`` each step's number, value and gradient norm. ``measure`` gives the
    metrics of the records, of a point and its value.
    """
    loop = _Loop(
        objective,
        solver,
        tol,
        solver.max_steps if max_steps is None else max_steps,
        log_spaced() if log_points is None else log_points,
        on_log,
        on_save,
        on_step,
        measure,
        first_step,
        previous_seconds,
    )
    try:
        loop.begin(point)
    except KeyboardInterrupt:
        loop.state = State(point, objective.value_and_grad(point))
        return loop.left(_INTERRUPTED)
    del point  # as large as a gradient, and no longer needed
    return loop.run()


@dataclass
class _Loop:
    """A run while it goes; it alone holds the state, which is as large as several points."""

    objective: Objective
    solver: Solver
    tol: float
    limit: int
    log_points: Iterator[int]
    on_log: OnLog | None
    on_save: OnLog | None
    on_step: OnStep | None
    measure: Measure | None
    first_step: int
    previous_seconds: float
    state: State = field(init=False)
    steps: int = 0
    progress: Progress = field(default_factory=Progress)
    history: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.started, self.next_log = time.perf_counter(), next(self.log_points)
        self.save_at = self.started + SAVE_SECONDS

    def begin(self, point: Point) -> None:
        with self.objective.watch("solver"):
            self.state = self.solver.init(self.objective, point)

    def run(self) -> Run:
        """Step to the end."""
        try:
            while (ended := self._ended()) is None:
                self._log_if_due()
                self._save_if_due()
                with self.objective.watch("solver"):
                    self.state = self.solver.step(self.objective, self.state)
                self.steps += 1
            self._log()
        except KeyboardInterrupt:
            ended = _INTERRUPTED
        except Exception:
            # Of several ranks others may be gone, and what was saved last is what there is.
            if self.objective.layout is None:
                self._save()  # what was reached is not lost with what went wrong
            raise
        return self.left(ended)

    def left(self, ended: Ended) -> Run:
        kept = replace(self.state, memory=None)  # a history of steps is as large as many points
        return Run(kept, self.steps, self._seconds(), *ended, self.history)

    def _seconds(self) -> float:
        return time.perf_counter() - self.started

    def _ended(self) -> Ended | None:
        """Whether this is the end. Judged before the log point, so that the last step is always in
        the history.
        """
        state, size = self.state, self.state.evaluation.gradient.norm()
        if self.on_step is not None and self.steps > 0:
            self.on_step(self.first_step + self.steps, state.evaluation.value, size)
        self.progress = self.progress.update(self.objective, state.evaluation, size)
        ended = _verdict(self.objective, state, size, self.tol)
        idle = self.progress.idle > max(200, self.steps // 4)
        if ended is None and not state.provisional and idle:
            self.progress = Progress()
            if _at_rounding(self.objective, state, size):
                ended = (
                    Outcome.STALLED,
                    "neither value nor gradient fall beyond rounding any more",
                )
        if ended is None and self.steps >= self.limit:
            ended = (
                Outcome.MAX_STEPS,
                f"stopped after max_steps = {self.limit}; raise max_steps or resume",
            )
        return ended

    def _record(self) -> StepRecord:
        step, seconds = self.first_step + self.steps, self.previous_seconds + self._seconds()
        return _record(self.objective, self.state, step, seconds)

    def _log_if_due(self) -> None:
        if self.steps >= self.next_log:
            self._log()
            while self.next_log <= self.steps:
                self.next_log = next(self.log_points)

    def _log(self) -> None:
        found = self._record()
        if self.measure is not None and math.isfinite(found.value):
            with self.objective.watch("metrics"):
                found = replace(found, metrics=self.measure(self.state.point, found.value))
        self.history.append(found)
        if self.on_log is not None:
            self.on_log(found, self.state.point)

    def _save_if_due(self) -> None:
        if self.objective.agreed(time.perf_counter() >= self.save_at):
            before = time.perf_counter()
            self._save()
            after = time.perf_counter()
            self.save_at = after + max(SAVE_SECONDS, 20.0 * (after - before))

    def _save(self) -> None:
        if self.on_save is not None:
            self.on_save(self._record(), self.state.point)


def _verdict(objective: Objective, state: State, size: float, tol: float) -> Ended | None:
    if not math.isfinite(size) or not math.isfinite(state.evaluation.value):
        return (
            Outcome.DIVERGED,
            "value or gradient is not finite; lower learning_rate or change the start",
        )
    if state.provisional:
        return None
    if size <= tol * objective.gradient_scale(state.point):
        return Outcome.CONVERGED, "the gradient is within tol"
    if size <= gradient_floor(objective, state.point):
        return (
            Outcome.STALLED,
            f"the gradient is at the rounding level of {objective.problem.dtype}",
        )
    if state.outcome is not None:
        return state.outcome, state.message
    return None


def _at_rounding(objective: Objective, state: State, size: float) -> bool:
    """Whether even the best step along the gradient, |g|^2 / (2 L) with L the largest curvature, is
    lost in rounding, or the gradient is no larger than what the roundings of the point and of the
    products can make of it, a few L |x| eps.

    Where neither is so, the steps are too small, not the problem finished: such a method goes on to
    its limit.
    """
    curvature = max(largest_curvature(objective, state.point), 1e-300)
    eps = torch.finfo(objective.problem.torch_dtype).eps
    lost = size * size / (2.0 * curvature) <= rounding(objective, state.evaluation.value)
    return lost or size <= 4.0 * eps * curvature * state.point.norm()


def _record(objective: Objective, state: State, step: int, seconds: float) -> StepRecord:
    found = state.evaluation
    accuracy = margin = None
    if found.statistics is not None:
        correct, margins = (found.statistics.margin > 0).double(), found.statistics.margin
        accuracy = state.point.summed(float(objective.row_weight @ correct))
        margin = float(margins.min()) if margins.numel() else math.inf
        margin = margin if objective.layout is None else objective.layout.least(margin)
    return StepRecord(
        step,
        found.value,
        found.data_value,
        found.gradient.norm(),
        objective.evaluations,
        seconds,
        accuracy,
        margin,
    )
