"""What happens at a log point of a run: a line in its log, its state from time to time, and what the caller shows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ufm_fast.runs import settings

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.runs.job import Job
    from ufm_fast.solvers.solution import Solution, StepRecord

SAVE_SECONDS = 10.0
#: NC metrics are logged by default up to this many entries of W and H: at ten times as many a point takes a second.
_CHEAP = 1 << 16


class Log:
    """What happens at a log point: a line in the log, the state at most every ten seconds, the progress bar."""

    def __init__(self, job: Job, report: Callable[[StepRecord], None]) -> None:
        self.job, self.report = job, report
        self._saved = time.monotonic()
        self._begun = job.fresh
        # On a resume the first record repeats the last one of the run before; those after its state are about to be dropped.
        steps = (record["step"] for record in job.run.records())
        self._last_step = max((step for step in steps if job.fresh or step <= job.progress.step), default=-1)
        self._latest: tuple[StepRecord, Callable[[], Point]] | None = None
        wanted = job.config["log_metrics"]
        size = job.problem.dim * (job.problem.num_classes + job.problem.rows(job.reduce).number)
        self._metrics = size <= _CHEAP if wanted is None else wanted

    def begin(self) -> None:
        """Before the first write of a run that goes on: only now is it sure that ``solve`` does not refuse it."""
        if not self._begun:
            run, config = self.job.run, self.job.config
            run.write_config(config, settings.digest(config, self.job.problem))
            run.truncate_log(self.job.progress.step)
            self._begun = True

    def __call__(self, record: StepRecord, point: Callable[[], Point]) -> None:
        self.begin()
        usable = math.isfinite(record.value)
        if record.step > self._last_step:
            metrics = self._measure(point()) if self._metrics and usable else {}
            self._append({**asdict(record), **metrics})
        if usable:
            self._latest = record, point
            if not self.job.run.state_file.exists() or time.monotonic() - self._saved >= SAVE_SECONDS:
                self._save()
        self.report(record)

    def _measure(self, point: Point) -> dict[str, float]:
        from ufm_fast.measure import collapse_metrics

        return collapse_metrics(self.job.problem, point, self.job.reduce)

    def _append(self, record: Mapping[str, Any]) -> None:
        self.job.run.append(record)
        self._last_step = record["step"]

    def _save(self) -> None:
        from ufm_fast.measure import usable
        from ufm_fast.runs.state import Progress, save_state

        if self._latest is not None:
            record, point = self._latest
            progress = Progress(record.step, record.evaluations, record.seconds)
            model = point()
            if usable(model) or not self.job.run.state_file.exists():  # a state on the way to infinity is no use
                save_state(self.job.run, self.job.problem, model, self.job.reduce, progress)
            self._saved = time.monotonic()

    def leave(self, *, saving: bool) -> None:
        """``solve`` raised: keep the latest log point of an interrupted run, and no trace of one that never began."""
        if self._latest is None and self.job.fresh:
            self.job.run.discard()
        elif saving:
            self._save()

    def finish(self, solution: Solution) -> None:
        """The last point belongs in the log; an interrupt and the closed form come without a log point."""
        if solution.steps > self._last_step:
            names = ("value", "data_value", "gradient_norm", "evaluations", "seconds")
            self._append({"step": solution.steps, **{name: getattr(solution, name) for name in names}})
