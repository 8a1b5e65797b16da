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
#: Seconds between calls of ``on_save``, or twenty times what the last one took, where that is more.
SAVE_SECONDS = 10.0


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
    limit, watch = solver.max_steps if max_steps is None else max_steps, objective.watch
    points = log_spaced() if log_points is None else log_points
    started = time.perf_counter()
    history: list[StepRecord] = []
    next_log = next(points)
    steps = 0
    progress = Progress()
    outcome, message = (
        Outcome.MAX_STEPS,
        f"stopped after max_steps = {limit}; raise max_steps or resume",
    )

    def record(current: State) -> StepRecord:
        return _record(
            objective, current, first_step + steps, previous_seconds + time.perf_counter() - started
        )

    def log(current: State) -> None:
        found = record(current)
        if measure is not None and math.isfinite(found.value):
            with watch("metrics"):
                found = replace(found, metrics=measure(current.point, found.value))
        history.append(found)
        if on_log is not None:
            on_log(found, current.point)

    def save(current: State) -> float:
        before = time.perf_counter()
        if on_save is not None:
            on_save(record(current), current.point)
        after = time.perf_counter()
        return after + max(SAVE_SECONDS, 20.0 * (after - before))

    interrupted = Outcome.INTERRUPTED, "interrupted; resume to go on"
    try:
        with watch("solver"):
            state = solver.init(objective, point)
    except KeyboardInterrupt:
        state = State(point, objective.value_and_grad(point))
        return Run(state, 0, time.perf_counter() - started, *interrupted, history)
    del point  # as large as a gradient, and no longer needed
    save_at = started + SAVE_SECONDS
    try:
        while True:
            # Judged before the log point, so that the last step is always in the history.
            size = state.evaluation.gradient.norm()
            if on_step is not None and steps > 0:
                on_step(first_step + steps, state.evaluation.value, size)
            progress = progress.update(objective, state.evaluation, size)
            ended = _verdict(objective, state, size, tol)
            if ended is None and not state.provisional and progress.idle > max(200, steps // 4):
                progress = Progress()
                if _at_rounding(objective, state, size):
                    ended = (
                        Outcome.STALLED,
                        "neither value nor gradient fall beyond rounding any more",
                    )
            if ended is not None:
                outcome, message = ended
            if ended is not None or steps >= limit:
                break
            if steps >= next_log:
                log(state)
                while next_log <= steps:
                    next_log = next(points)
            if objective.agreed(time.perf_counter() >= save_at):
                save_at = save(state)
            with watch("solver"):
                state = solver.step(objective, state)
            steps += 1
        log(state)
    except KeyboardInterrupt:
        outcome, message = interrupted
    except Exception:
        if (
            objective.layout is None
        ):  # of several ranks others may be gone, and what was saved last is what there is
            save(state)  # what was reached is not lost with what went wrong
        raise
    kept = replace(state, memory=None)  # a history of steps is as large as many points
    return Run(kept, steps, time.perf_counter() - started, outcome, message, history)


def _verdict(
    objective: Objective, state: State, size: float, tol: float
) -> tuple[Outcome, str] | None:
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
