"""The starts of a solve, one after another: the best is kept, and what has ended is never done
again.

Each start is a run of `minimise` from a seed of its own. When one of several ends, the best point
so far is saved with a row for each that has ended (`Starts`), and along the way a start's point
where it lies below that best. So whatever ends the process, the next goes on with the start after
those rows: from its seed, or from the saved point where that is of this start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from ufm_fast.factor_metrics import logit_rank, logit_spectrum
from ufm_fast.given_starts import given_start
from ufm_fast.measure import collapse_metrics, usable
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import State
from ufm_fast.solvers.callbacks import Callback
from ufm_fast.solvers.minimise import OnLog, Run, log_spaced, minimise
from ufm_fast.solvers.options import SolveOptions
from ufm_fast.solvers.solution import Effort, Outcome, Restart, Starts, StepRecord
from ufm_fast.solvers.table import METHODS
from ufm_fast.starts import make_start

#: NC metrics are logged by default up to this many entries of W, H and layers: at ten times as many
#: a point takes a second.
CHEAP = 1 << 16
#: Called with a record, a function that gives the model's Point, and how far several starts have
#: come; None of a single one.
OnSave = Callable[[StepRecord, Callable[[], Point], Starts | None], None]


@dataclass(frozen=True)
class Begun:
    """Where a solve goes on: the point that was given or saved, what was spent, the starts that
    have ended.
    """

    point: Point | None
    spent: Effort
    starts: Starts


class StartLoop:
    """``options.restarts`` starts of an objective. After ``run``: ``rows``, one a start, and
    ``starts``; of several only.
    """

    def __init__(
        self,
        objective: Objective,
        options: SolveOptions,
        begun: Begun,
        callbacks: Callback,
        on_save: OnSave | None,
    ) -> None:
        self.objective, self.options, self.callbacks, self.on_save = (
            objective,
            options,
            callbacks,
            on_save,
        )
        self.first = self.spent = begun.spent
        self.done, self.several = list(begun.starts.done), options.restarts > 1
        self.given = begun.point if begun.starts.pending else None
        self.best = (
            self._ended(begun.point) if self.given is None and begun.point is not None else None
        )
        self.stopped: tuple[Restart, ...] = ()  # the row of the start that was interrupted
        self.pending = False

    @property
    def rows(self) -> tuple[Restart, ...]:
        return (*self.done, *self.stopped) if self.several else ()

    @property
    def starts(self) -> Starts | None:
        """What goes with the best point when it is saved."""
        return Starts(tuple(self.done), self.pending) if self.several else None

    def run(self) -> Run:
        """The best of all starts, or of those before an interrupt."""
        for i in range(len(self.done), self.options.restarts):
            run, row = self._one(i)
            if self.best is None or _height(run) < _height(self.best):
                self.best, self.pending = run, run.outcome is Outcome.INTERRUPTED
            if run.outcome is Outcome.INTERRUPTED:
                self.best, self.stopped = (
                    replace(self.best, outcome=run.outcome, message=run.message),
                    (row,),
                )
                break
            self.done.append(row)
            if self.on_save is not None and i + 1 < self.options.restarts:
                at_best = partial(self.objective.to_model, self.best.state.point)
                self.on_save(
                    last_record(self.objective, self.best, self.spent), at_best, self.starts
                )
        assert self.best is not None
        steps, seconds = (
            self.spent.steps - self.first.steps,
            self.spent.seconds - self.first.seconds,
        )
        return replace(self.best, steps=steps, seconds=seconds)

    def _one(self, i: int) -> tuple[Run, Restart]:
        """Start number i, and its row."""
        objective, seed = self.objective, self.objective.problem.seed + i
        before = self.spent.steps, objective.evaluations
        if self.given is not None and self.several:  # an earlier run began it
            before = sum(row.steps for row in self.done), sum(row.evaluations for row in self.done)
        run = _at_exact_point(objective, self._minimised(self._first_point(seed)))
        self.given = None
        self.spent = Effort(
            self.spent.steps + run.steps, objective.evaluations, self.spent.seconds + run.seconds
        )
        return run, self._row(
            run, seed, self.spent.steps - before[0], objective.evaluations - before[1]
        )

    def _first_point(self, seed: int) -> Point:
        self.callbacks.phase("start")
        if self.given is not None:
            return given_start(self.objective, self.given)
        return make_start(
            self.objective, self.options.start, seed=seed, scale=self.options.start_scale
        )

    def _minimised(self, point: Point) -> Run:
        objective, options, every, callbacks = (
            self.objective,
            self.options,
            self.options.log_every,
            self.callbacks,
        )
        callbacks.phase("steps")
        return minimise(  # which lets go of the start
            objective,
            METHODS[options.method].make(objective.problem, options),
            point,
            tol=options.tol,
            max_steps=options.max_steps,
            on_save=self._saving(),
            on_log=lambda record, x: callbacks.log(record, partial(objective.to_model, x)),
            on_step=callbacks.step,
            measure=self._measure if self._measuring else None,
            log_points=log_spaced() if every is None else iter(range(0, 1 << 62, every)),
            first_step=self.spent.steps,
            previous_seconds=self.spent.seconds,
        )

    @property
    def _measuring(self) -> bool:
        """Whether log points have metrics: as asked for, else where they cost little."""
        wanted, objective = self.options.log_metrics, self.objective
        return (
            objective.problem.entries(objective.rows.number) <= CHEAP if wanted is None else wanted
        )

    def _measure(self, point: Point, value: float) -> Mapping[str, float]:
        objective = self.objective
        return collapse_metrics(
            objective.problem, objective.to_model(point), objective.reduce, value
        )

    def _saving(self) -> OnLog | None:
        """``on_save`` of points that are better than the best start so far."""
        on_save, to_model = self.on_save, self.objective.to_model
        if on_save is None:
            return None
        least = math.inf if self.best is None else _height(self.best)
        starts = Starts(tuple(self.done)) if self.several else None

        def save(record: StepRecord, point: Point) -> None:
            if self.best is None or record.value < least:
                on_save(record, lambda: to_model(point), starts)

        return save

    def _ended(self, point: Point) -> Run:
        """The best of the starts that have ended, from its saved point."""
        x = given_start(self.objective, point)
        row = min(self.done, key=lambda row: row.value if math.isfinite(row.value) else math.inf)
        state = State(x, self.objective.value_and_grad(x))
        return Run(
            state,
            0,
            0.0,
            Outcome(row.outcome),
            f"the best of {len(self.done)} starts, which ended before",
        )

    def _row(self, run: Run, seed: int, steps: int, evaluations: float) -> Restart:
        model, value = self.objective.to_model(run.state.point), run.state.evaluation.value
        fits = math.isfinite(value) and usable(model)
        rank = (
            logit_rank(logit_spectrum(self.objective.problem, self.objective.rows, model))
            if fits
            else None
        )
        return Restart(seed, value, steps, evaluations, rank, run.outcome.value)


def last_record(objective: Objective, run: Run, spent: Effort) -> StepRecord:
    """The record of a run's point after all that was spent."""
    found = run.state.evaluation
    return StepRecord(
        spent.steps,
        found.value,
        found.data_value,
        found.gradient.norm(),
        objective.evaluations,
        spent.seconds,
    )


def _height(run: Run) -> float:
    value = run.state.evaluation.value
    return value if math.isfinite(value) else math.inf


def _at_exact_point(objective: Objective, run: Run) -> Run:
    """The evaluation of the objective itself, where a solver stopped at an easier one."""
    if not run.state.provisional:
        return run
    return replace(run, state=State(run.state.point, objective.value_and_grad(run.state.point)))
