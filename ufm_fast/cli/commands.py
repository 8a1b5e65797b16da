"""What each command does; imported when one runs, since it imports torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ufm_fast.cli import report
from ufm_fast.cli.app import INTERRUPTED, NOT_CONVERGED, OK
from ufm_fast.cli.heartbeat import Heartbeat
from ufm_fast.cli.plan_tables import group_plan_table, plan_tables
from ufm_fast.cli.progress import progress_bar
from ufm_fast.errors import InputError
from ufm_fast.presets import PRESETS
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.files import WriteError, first_line
from ufm_fast.runs.model import is_network, saved_model
from ufm_fast.runs.words import printable, quoted
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
        return run_job(lambda: job_of(given, file, out, resume), shown)


def run_job(make: Callable[[], Job | RunDirectory], shown: Shown, *, speaks: bool = True) -> int:
    """Make a job, solve it, save and report; the exit code. ``speaks``: this process says how to go
    on.
    """
    from ufm_fast.tensorboard import TensorBoard

    note = report.note if speaks else _unsaid
    with Heartbeat(
        report.note, shown=speaks and not shown.silent, bar=Console(stderr=True).is_terminal
    ) as heartbeat:
        job = make()
        if isinstance(job, RunDirectory):
            return _already_finished(job, json=shown.json, silent=shown.silent, plots=shown.plots)
        if job.grouped:
            return _solve_groups(job, json=shown.json, quiet=shown.quiet, plots=shown.plots)
        try:
            heard = (
                [heartbeat, TensorBoard(job.run.path / "tensorboard")]
                if shown.tensorboard
                else [heartbeat]
            )
            heartbeat.size = _size(job)
            solution = _executed(job, shown, heard)
        except KeyboardInterrupt:
            if not job.run.state_file.exists():
                raise
            note(f"interrupted and saved; go on with: {_resuming(job.run)}")
            if shown.json:  # between the last step and the summary
                report.print_json(
                    {"outcome": "interrupted", "run": str(job.run.path), "config": job.config}
                )
            return INTERRUPTED
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


def _solve_groups(job: Job, *, json: bool, quiet: bool, plots: bool) -> int:
    from ufm_fast.runs.running import execute_groups

    summary = {**execute_groups(job), "run": str(job.run.path), "config": job.config}
    if json:
        report.print_json(summary)
    elif not quiet:
        for note in job.notes:
            report.note(note)
        Console().print(report.result_table(summary, str(job.run.path)))
    if plots:
        _draw(job.run, silent=json or quiet)
    return OK


def job_of(
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


def _executed(job: Job, shown: Shown, callbacks: Sequence[Callback]) -> Solution:
    """Errors: what ``execute`` raises, and a word on how to go on where something was saved
    before.
    """
    import torch

    from ufm_fast.runs.running import execute

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


def _already_finished(run: RunDirectory, *, json: bool, silent: bool, plots: bool) -> int:
    assert run.summary is not None
    summary = run.summary
    closed = summary["method"] == "closed-form"
    if json:  # a resume that was killed may have left a smaller tol in config.json
        config = run.config if closed else {**run.config, "tol": summary["tol"]}
        report.print_json({**summary, "run": str(run.path), "config": config})
    elif silent:
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
    if plots:
        from ufm_fast.runs.figures import are_drawn

        if not are_drawn(run):  # as where the run was killed while it drew
            _draw(run, silent=silent)
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
        _list_paths("plots:", paths)
        if not any(path.stem == "collapse" for path in paths):
            report.note(
                "no collapse figure: the log has no NC metrics; --log-metrics asks for them where "
                "they are costly"
            )


def _list_paths(title: str, paths: list[Path]) -> None:
    # Not through rich, which would break long paths.
    print(printable(title))
    for path in paths:
        print(f"  {printable(str(path))}")


def metrics(source: Path, *, json: bool, pairwise: str, seed: int) -> None:
    run = RunDirectory.open(source, "source") if os.path.isdir(source) else None
    if run is None or is_network(run):
        found, skipped = _metrics_of_head(source, pairwise, seed)
    else:
        found, skipped = _metrics_of_run(run, pairwise, seed)
    if json:
        report.print_json({"source": str(source), "skipped_rows": skipped, "metrics": found})
        return
    Console().print(report.metrics_table(found))
    if skipped:
        print(
            f"{skipped} rows with several targets have no class; metrics of means are over the "
            f"other rows"
        )


def _metrics_of_run(run: RunDirectory, pairwise: Any, seed: int) -> tuple[dict[str, float], int]:
    """Metrics of a saved model, as ``solve`` measures them, and how many rows have several
    targets.
    """
    from ufm_fast.groups import group_metrics
    from ufm_fast.measure import measure
    from ufm_fast.runs.grouped import load_groups

    grouped = load_groups(run)
    if grouped is not None:
        return group_metrics(grouped), 0
    problem, reduce, model = saved_model(run, "source", device="cpu", seed=seed)
    rows = problem.rows(reduce)
    skipped = 0 if rows.targets.single or problem.dense else int((rows.targets.sizes() != 1).sum())
    value = (run.summary or {}).get(
        "value"
    ) or 0.0  # beside which factors of a minimum of zero are rounding
    return measure(problem, rows, model, pairwise, value), skipped


def _metrics_of_head(source: Path, pairwise: Any, seed: int) -> tuple[dict[str, float], int]:
    """Metrics of a classifier and features from a file, or of a trained network."""
    from ufm_fast.metrics import collect, comparable
    from ufm_fast.runs.foreign import read_head

    head = read_head(source, "source")
    H, labels, counts = comparable(head.H, head.labels, head.counts)
    return collect(
        H, head.W, labels, head.b, counts=counts, pairwise=pairwise, seed=seed
    ), head.skipped


def plan(given: Mapping[str, Any], file: Path | None, *, json: bool) -> None:
    from ufm_fast.groups.planning import make_group_plan
    from ufm_fast.plan import make_plan
    from ufm_fast.runs.job import check_choices, on_groups

    config = settings.resolve(given, file)
    check_choices(config)
    config["device"], _ = settings.pick_device(config["device"])
    problem = settings.build_problem(config)
    if on_groups(problem, config):
        planned = make_group_plan(problem)
        if json:
            report.print_json(planned.summary())
        else:
            Console().print(group_plan_table(planned))
        return
    names = ("reduce", "method", "history", "variables", "certificate")
    made = make_plan(problem, **{name: config[name] for name in names})
    if json:
        report.print_json(made.summary())
    else:
        for table in plan_tables(made):
            Console().print(table)
        for note in made.notes:
            print(f"- {note}")


def plot(runs: list[Path], compare: Path | None = None) -> None:
    from ufm_fast.runs.figures import draw_run, draw_together

    opened = [RunDirectory.open(path, "runs") for path in runs]
    if compare is not None:
        _list_paths(f"{compare}:", draw_together(opened, compare))
        return
    for run in opened:
        _list_paths(f"{run.path}:", draw_run(run))


def doctor(*, json: bool) -> bool:
    from ufm_fast import doctor as checks

    results = checks.self_test()
    passed = all(check.passed for check in results)
    if json:
        content = {
            "versions": checks.versions(),
            "devices": checks.devices(),
            "backends": checks.backends(),
            "self_test": [asdict(check) for check in results],
            "passed": passed,
        }
        report.print_json(content)
        return passed
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, found in checks.versions().items():
        table.add_row(name, found or "not installed")
    for device in checks.devices():
        table.add_row("device", device)
    for name, state in checks.backends().items():
        table.add_row(f"backend {name}", state)
    for check in results:
        table.add_row(check.name, f"{'ok' if check.passed else 'FAILED'}  ({check.detail})")
    Console().print(table)
    print(
        "all tests passed" if passed else "a test FAILED: results on this machine can't be trusted"
    )
    return passed


def export(run: Path, kind: str, out: Path | None, *, quiet: bool) -> None:
    from ufm_fast.runs.exports import export_run

    paths = export_run(RunDirectory.open(run, "run"), kind, out)
    if not quiet:
        _list_paths("written:", paths)


def print_presets(json: bool) -> None:
    if json:
        report.print_json({name: asdict(preset) for name, preset in PRESETS.items()})
        return
    for preset in PRESETS.values():
        settings = " ".join(f"{key}={value}" for key, value in preset.defaults.items())
        print(f"{preset.name}: {preset.title} ({preset.source})")
        print(f"  exact: {preset.exact}\n  our choice: {preset.choice}\n  settings: {settings}\n")
