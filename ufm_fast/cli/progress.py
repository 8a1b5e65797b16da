"""The bar of a solve: how far its gradient has come towards the tolerance, in decades."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ufm_fast.cli.report import note

if TYPE_CHECKING:
    from ufm_fast.runs.job import Job
    from ufm_fast.solvers.solution import StepRecord


@contextmanager
def progress_bar(job: Job, shown: bool) -> Iterator[Callable[[StepRecord], None]]:
    """The job's notes, once it really runs, and a bar of the decades that the gradient norm has
    fallen.

    The bar needs standard error to be a terminal.
    """
    console = Console(stderr=True)
    notes = list(job.notes) if shown else []

    def announce(record: StepRecord | None = None) -> None:
        while notes:
            note(notes.pop(0))

    if not shown or not console.is_terminal:
        yield announce
        announce()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} % of the way to tol"),
        TextColumn("value {task.fields[value]}"),
        TextColumn("gradient {task.fields[gradient]}"),
        TimeElapsedColumn(),
    )
    way = _Way(max(job.config["tol"] * job.problem.mu, 1e-300))
    most = job.config["max_steps"]
    last = "" if most is None else f"/{job.progress.step + most:,}"
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(
            "solve", total=1.0, step=f"{job.progress.step:,}{last}", value="", gradient=""
        )

        def report(record: StepRecord) -> None:
            announce()
            progress.update(
                task,
                completed=way.gone(record.gradient_norm),
                step=f"{record.step:,}{last}",
                value=f"{record.value:.9g}",
                gradient=f"{record.gradient_norm:.1e}",
            )

        yield report
        progress.update(task, completed=1.0)


class _Way:
    """How many of the decades from the first gradient norm to the one of tol are behind, at best so
    far.
    """

    def __init__(self, target: float) -> None:
        self._target, self._best = target, 0.0
        self._first: float | None = None

    def gone(self, norm: float) -> float:
        if self._first is None:
            self._first = norm
        self._best = max(self._best, _decades(self._first, norm, self._target))
        return self._best


def _decades(first: float, now: float, target: float) -> float:
    if not (math.isfinite(first) and math.isfinite(now) and first > target and now > 0):
        return 0.0
    return min(max(math.log(first / now) / math.log(first / target), 0.0), 1.0)
