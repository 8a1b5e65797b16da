"""``ufm-fast solve``: make a job, solve it, save, and say what came of it and how to go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ufm_fast.cli import report
from ufm_fast.cli.app import INTERRUPTED, NOT_CONVERGED, OK
from ufm_fast.cli.heartbeat import Heartbeat
from ufm_fast.cli.progress import progress_bar
from ufm_fast.errors import InputError
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import WriteError, first_line
from ufm_fast.runs.words import quoted
from ufm_fast.stopwatch import NO_WATCH, Stopwatch

if TYPE_CHECKING:
    from ufm_fast.runs.job import Job
    from ufm_fast.solvers.callbacks import Callback
    from ufm_fast.solvers.solution import Solution


@dataclass(frozen=True)
class Shown:
    """What a solve shows, and writes beside its run. ``json``: one object; ``quiet``: errors;
    ``verbose``: seconds by phase.
    """

    json: bool = False
    quiet: bool = False
    plots: bool = True
    verbose: bool = False
    tensorboard: bool = False

    @property
    def silent(self) -> bool:
        return self.json or self.quiet


def solve(
    given: Mapping[str, Any], file: Path | None, out: Path | None, resume: Path | None, shown: Shown
) -> int:
    """Solve or resume, in one process or on the ranks that torchrun started; returns the exit
    code.
    """
    from ufm_fast.runs.ranks import started
    from ufm_fast.runs.signals import terminate_like_interrupt
    from ufm_fast.tensorboard import summary_writer

    if shown.tensorboard:
        summary_writer()  # or a refusal, before anything is written
    if started():
        from ufm_fast.cli.on_ranks import solve_on_ranks

        return solve_on_ranks(given, file, out, resume, shown)
    with terminate_like_interrupt():
        return run_job(lambda: _job_of(given, file, out, resume), shown)


def run_job(make: Callable[[], Job | RunDirectory], shown: Shown, *, speaks: bool = True) -> int:
    """Make a job, solve it, save and report; the exit code. ``speaks``: this process says how to go
    on.
    """
    note = report.note if speaks else _unsaid
    with Heartbeat(
        report.note, shown=speaks and not shown.silent, bar=Console(stderr=True).is_terminal
    ) as heartbeat:
        job = make()
        if isinstance(job, RunDirectory):
            return _already_finished(job, shown)
        if job.grouped:
            return _solve_groups(job, shown)
        try:
            heartbeat.size = _size(job)
            solution = _executed(job, shown, heartbeat)
        except KeyboardInterrupt:
            if not job.run.state_file.exists():
                raise
            note(f"interrupted and saved; go on with: {_resuming(job.run)}")
            if shown.json:  # between the last step and the summary
                report.print_json(
                    {"outcome": "interrupted", "run": str(job.run.path), "config": job.config}
                )
            return INTERRUPTED
    return _told(solution, job, shown, note)


def _told(solution: Solution, job: Job, shown: Shown, note: Callable[[str], None]) -> int:
    """Print and draw a solution; the exit code."""
    interrupted = solution.outcome.value == "interrupted"
    _print_solution(solution, job, shown)
    if shown.plots and not interrupted:
        _draw(job.run, silent=shown.silent)
    if interrupted:
        note(
            f"interrupted after {solution.steps} steps and saved; go on with: {_resuming(job.run)}"
        )
        return INTERRUPTED
    if not solution.success and not shown.silent:
        report.note(_how_to_go_on(solution, job.config["method"], job.run))
    return OK if solution.success else NOT_CONVERGED


def _print_solution(solution: Solution, job: Job, shown: Shown) -> None:
    summary = {**solution.summary(), "run": str(job.run.path), "config": job.config}
    if shown.json:
        report.print_json(summary)
    elif not shown.quiet:
        Console().print(report.result_table(summary, str(job.run.path)))
        if solution.restarts:
            Console().print(report.restarts_table(summary))
        if solution.phases:
            Console().print(report.phases_table(solution.phases))


def _unsaid(text: str) -> None:
    """What another rank says."""


def _solve_groups(job: Job, shown: Shown) -> int:
    from ufm_fast.runs.running import execute_groups

    summary = {**execute_groups(job), "run": str(job.run.path), "config": job.config}
    if shown.json:
        report.print_json(summary)
    elif not shown.quiet:
        for note in job.notes:
            report.note(note)
        Console().print(report.result_table(summary, str(job.run.path)))
    if shown.plots:
        _draw(job.run, silent=shown.silent)
    return OK


def _job_of(
    given: Mapping[str, Any], file: Path | None, out: Path | None, resume: Path | None
) -> Job | RunDirectory:
    from ufm_fast.runs.job import prepare
    from ufm_fast.runs.resuming import resume as resumed

    if resume is None:
        return prepare(given, file, out)
    if out is not None:
        raise InputError(
            "out and resume contradict one another: a resumed run stays in its directory; drop "
            "--out"
        )
    return resumed(resume, given, file)


def _size(job: Job) -> str:
    rows, problem = job.problem.rows(job.reduce).number, job.problem
    return f"; {rows:,} rows, {problem.num_classes:,} classes, {problem.dim:,} dimensions"


def _executed(job: Job, shown: Shown, heartbeat: Heartbeat) -> Solution:
    """Errors: what ``execute`` raises, and a word on how to go on where something was saved
    before.
    """
    import torch

    from ufm_fast.runs.running import execute
    from ufm_fast.tensorboard import TensorBoard

    callbacks: list[Callback] = [heartbeat]
    if shown.tensorboard:
        callbacks.append(TensorBoard(job.run.path / "tensorboard"))
    watch = Stopwatch(torch.device(job.problem.device)) if shown.verbose else NO_WATCH
    try:
        with progress_bar(job, shown=not shown.silent) as bar:
            return execute(job, bar, callbacks=callbacks, watch=watch)
    except WriteError as error:
        again = _resuming(job.run) if job.run.state_file.exists() else "the same command"
        raise InputError(f"{error} with {again}") from error
    except InputError:
        raise
    except Exception:
        if job.run.state_file.exists() and not job.asked:  # on several ranks each says so itself
            report.note(
                f"what was reached is saved; go on with: {_resuming(job.run)} (--no-certificate "
                f"leaves the proof out)"
            )
        raise


def _resuming(run: RunDirectory) -> str:
    return f"ufm-fast solve --resume {quoted(run.path)}"


def _how_to_go_on(solution: Solution, method: str, run: RunDirectory) -> str:
    if solution.outcome.value == "kink":
        return (
            "stopped at a kink of the ReLU, short of a stationary point: solve from other seeds "
            "into another --out (--restarts)"
        )
    if solution.outcome.value != "diverged":
        return f"not converged; go on with: {_resuming(run)} --max-steps N"
    if solution.steps > 0 and method in ("gd", "momentum", "nesterov", "adam"):
        return f"diverged; go on from before with smaller steps: {_resuming(run)} --learning-rate X"
    return "diverged; solve from another --start into another --out"


def _already_finished(run: RunDirectory, shown: Shown) -> int:
    assert run.summary is not None
    summary = run.summary
    closed = summary["method"] == "closed-form"
    if shown.json:  # a resume that was killed may have left a smaller tol in config.json
        config = run.config if closed else {**run.config, "tol": summary["tol"]}
        report.print_json({**summary, "run": str(run.path), "config": config})
    elif shown.quiet:
        pass
    elif closed:
        report.note(
            f"{run.path} is finished (by the closed form); --method auto would go on from its point"
        )
    else:
        report.note(
            f"{run.path} is finished ({summary['outcome']} at tol {summary['tol']:g}); a smaller "
            f"--tol would go on"
        )
    if shown.plots:
        from ufm_fast.runs.figures import are_drawn

        if not are_drawn(run):  # as where the run was killed while it drew
            _draw(run, silent=shown.silent)
    return OK


def _draw(run: RunDirectory, *, silent: bool) -> None:
    """Figures are an extra of a solve: what keeps them from being drawn is said, and is no failure
    of the solve.
    """
    from ufm_fast.runs.figures import draw_run

    try:
        paths = draw_run(run)
    except Exception as error:  # matplotlib raises whatever a setting of its own leads it to
        if not silent:
            report.note(f"no plots: {first_line(error)}")
        return
    if not silent:
        report.list_paths("plots:", paths)
        if not any(path.stem == "collapse" for path in paths):
            report.note(
                "no collapse figure: the log has no NC metrics; --log-metrics asks for them where "
                "they are costly"
            )
