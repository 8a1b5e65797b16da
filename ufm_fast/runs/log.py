"""What happens at a log point of a run: a line in its log, its state from time to time, and what
the caller shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ufm_fast.runs import settings

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.runs.job import Job
    from ufm_fast.solvers.solution import Solution, Starts, StepRecord


class Log:
    """A line in the log and the progress bar at log points; the state at the first of them and
    where ``solve`` asks for it.
    """

    def __init__(self, job: Job, report: Callable[[StepRecord], None]) -> None:
        from ufm_fast.solvers.solution import Starts

        self.job, self.report = job, report
        self._begun = job.fresh
        # On a resume the first record repeats the last one of the run before; those after its state
        # are about to be dropped.
        steps = (record["step"] for record in job.run.records())
        self._last_step = max(
            (step for step in steps if job.fresh or step <= job.progress.step), default=-1
        )
        self._reached: tuple[StepRecord, Callable[[], Point]] | None = None
        self._unsaved = False
        self._several = job.restarts > 1
        self._starts = job.progress.starts or (Starts() if self._several else None)

    def _begin(self) -> None:
        """Before the first write of a run that goes on: only now is it sure that ``solve`` does not
        refuse it.
        """
        if not self._begun:
            run, config = self.job.run, self.job.config
            run.write_config(config, settings.digest(config, self.job.problem))
            run.truncate_log(self.job.progress.step)
            self._begun = True

    def __call__(self, record: StepRecord, point: Callable[[], Point]) -> None:
        self._begin()
        usable = math.isfinite(record.value)
        if record.step > self._last_step:
            self._append(record.flat())
        saved = self.job.run.has_state
        if usable and not (saved and self._several):  # of several starts ``solve`` saves the best
            self._reach(record, point)
            if not saved:
                self._write()
        self.report(record)

    def save(self, record: StepRecord, point: Callable[[], Point], starts: Starts | None) -> None:
        """The state, unless it is on the way to infinity: a resume can start from one before, with
        smaller steps.
        """
        self._begin()
        self._starts = starts or self._starts
        if not self.job.run.has_state or (
            math.isfinite(record.value) and math.isfinite(record.gradient_norm)
        ):
            self._reach(record, point)
            self._write()

    def _append(self, record: Mapping[str, Any]) -> None:
        self.job.run.append(record)
        self._last_step = record["step"]

    def _reach(self, record: StepRecord, point: Callable[[], Point]) -> None:
        self._reached, self._unsaved = (record, point), True

    def _write(self) -> None:
        from ufm_fast.measure import usable
        from ufm_fast.runs.state import Progress, save_state

        assert self._reached is not None
        record, point = self._reached
        model = point()
        if not self.job.run.has_state or usable(model):
            progress = Progress(record.step, record.evaluations, record.seconds, self._starts)
            save_state(self.job.run, self.job.problem, model, self.job.reduce, progress)
        self._unsaved = False

    def leave(self, *, saving: bool) -> None:
        """``solve`` raised: keep what an interrupted run had reached, and no trace of one that
        never began.
        """
        if self._reached is None and self.job.fresh:
            self.job.run.discard()
        elif saving and self._unsaved:
            self._write()

    def finish(self, solution: Solution) -> None:
        """The last point belongs in the log; an interrupt and the closed form come without a log
        point.
        """
        if solution.steps > self._last_step:
            names = ("value", "data_value", "gradient_norm", "evaluations", "seconds")
            self._append(
                {"step": solution.steps, **{name: getattr(solution, name) for name in names}}
            )
