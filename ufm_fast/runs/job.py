"""A solve that is saved: a configuration becomes a run directory, also when it is interrupted or
continued.

job = prepare({"classes": 10, "dim": 16}, None, Path("run"))
solution = execute(job)

Decisions

2026-11-26. What a resume changes is written at its first log point, when `solve` can refuse no
more, and `summary.json` keeps the tolerance that was reached: a resumed run that died had counted
as finished. The hash is made anew from the settings in force and compared, so edited settings are
refused. A start's rows are matched with the problem's by their labels.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory, refuse_occupied
from ufm_fast.runs.options import SETTINGS, resumable, taken_by
from ufm_fast.runs.settings import Config
from ufm_fast.runs.words import quoted

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.problem import Problem
    from ufm_fast.runs.state import Progress
    from ufm_fast.solvers.options import SolveOptions
    from ufm_fast.solvers.solution import Solution, StepRecord


def _no_progress() -> Progress:
    from ufm_fast.runs.state import Progress

    return Progress()


@dataclass
class Job:
    """A solve that is about to run: its problem, where it writes, and where it starts."""

    problem: Problem
    config: Config
    run: RunDirectory
    start: Point | None
    progress: Progress = field(default_factory=_no_progress)
    notes: list[str] = field(default_factory=list)
    fresh: bool = True  # the run directory was made by this call
    stamp: tuple[int, ...] | None = None  # of a run that goes on: its files when they were read
    asked: Mapping[str, Any] = field(
        default_factory=dict
    )  # of ``solve``, in the place of the configured: what ranks need
    saved: Callable[[], Point] | None = (
        None  # of ranks: where a run goes on, which all must call together
    )

    @property
    def reduce(self) -> str:
        return self.problem.reduction(self.config["reduce"])

    @property
    def restarts(self) -> int:
        """Starts that ``solve`` is asked for: a run whose starts have all ended goes on from the
        best of them.
        """
        wanted, starts = int(self.config["restarts"]), self.progress.starts
        ended = starts is None or len(starts.done) >= wanted  # none: saved before starts were kept
        return 1 if self.start is not None and not self.fresh and ended else wanted

    @property
    def grouped(self) -> bool:
        """Whether the problem is solved on groups of classes of equal counts."""
        return self.progress.step == 0 and on_groups(self.problem, self.config)


# ---- a new run
# --------------------------------------------------------------------------------------------------


def prepare(given: Mapping[str, Any], file: Path | None, out: Path | None) -> Job:
    """Check everything that can be checked before the first step, then make the run directory."""
    found = checked(given, file)
    return begun(found, out, given_point(found.problem, found.config))


class Checked(NamedTuple):
    """A configuration that can be solved. ``asked``: as of `Job`."""

    problem: Problem
    config: Config
    hashes: list[str]
    notes: list[str]
    asked: dict[str, Any]


def checked(given: Mapping[str, Any], file: Path | None, ranks: int = 0) -> Checked:
    """What can be checked before anything is written; ``ranks``: of a run on so many."""
    config = settings.resolve(given, file)
    asked = _of_ranks(config) if ranks else {}
    check_choices(config | asked)
    config["device"], note = settings.pick_device(config["device"])
    problem = settings.build_problem(config)
    check_solvable(problem, config | asked, ranks or 1)
    config |= {
        "classes": problem.num_classes,
        "lambda_w": problem.lambda_w,
        "lambda_h": problem.lambda_h,
    }
    return Checked(problem, config, settings.hashes(config, problem), [note] if note else [], asked)


def _of_ranks(config: Config) -> dict[str, Any]:
    """What ``solve`` is asked for on several ranks; the configuration is then that of any number of
    them.
    """
    from ufm_fast.backends import SHARDED

    name = config["backend"]
    spread = {"auto": "sharded", "tiled": "sharded-tiled", "triton": "sharded-triton"}
    if name not in (*spread, *SHARDED):
        raise InputError(
            f"backend {name} is for one process, and torchrun starts several; drop it, or choose "
            f"{' or '.join(list(spread)[1:])} for each of them"
        )
    asked = {"backend": spread.get(name, name), "mesh": config["mesh"]}
    config |= {"backend": "auto", "mesh": None}
    return asked


def begun(found: Checked, out: Path | None, start: Point | None) -> Job:
    """The job in its new run directory. Errors: InputError where that can't be."""
    from ufm_fast.doctor import environment

    problem, config, hashes, notes, asked = found
    own = Path("runs") / f"{config['loss']}-{problem.num_classes}-{problem.dim}-{hashes[0][:8]}"
    path = out or _first_free(own)
    refuse_occupied(path, *hashes)
    run = RunDirectory.create(path, config, hashes[0], environment(problem.device))
    if out is None and path != own:
        notes.append(
            f"{own} holds this problem already, and --resume {quoted(own)} goes on with it; this "
            f"run is {path}"
        )
    return Job(problem, config, run, start, notes=notes, asked=asked)


def _first_free(path: Path) -> Path:
    """``path``, or the first of path-2, path-3, ... that holds no run: the same command may be
    given twice.
    """
    names = (
        path if number == 1 else path.with_name(f"{path.name}-{number}")
        for number in itertools.count(1)
    )
    return next(name for name in names if not (name / "config.json").exists())


def given_point(problem: Problem, config: Mapping[str, Any]) -> Point | None:
    """The point of the file that a run starts from, if there is one."""
    from ufm_fast.runs.foreign import read_start

    return (
        None
        if config["start_from"] is None
        else read_start(Path(config["start_from"]), problem, config["reduce"])
    )


def on_groups(problem: Problem, config: Mapping[str, Any]) -> bool:
    """Whether a configuration is solved on groups. Errors: InputError where it asks for that and
    can't be.
    """
    from ufm_fast.groups.choice import by_groups

    return by_groups(problem, options_of(config), begun=config["start_from"] is not None)


def check_choices(config: Mapping[str, Any]) -> None:
    """Options that contradict one another or do not exist, before anything is built."""
    options_of(config)
    if config["max_steps"] is not None and config["max_steps"] < 1:
        raise InputError(f"max_steps must be at least 1, got {config['max_steps']}")


def options_of(config: Mapping[str, Any]) -> SolveOptions:
    from ufm_fast.solvers.options import SolveOptions

    return SolveOptions.of(**{name: config[name] for name in taken_by("solve")})


def check_solvable(problem: Problem, config: Mapping[str, Any], ranks: int = 1) -> None:
    """What ``solve`` would refuse, before anything is written; and what the free memory can't hold,
    by any method, of this rank's part.

    Errors: InputError for options that contradict problem or method; where two points and their
    gradients do not fit.
    """
    import torch

    from ufm_fast.backends.base import compute_dtype
    from ufm_fast.memory import available_bytes
    from ufm_fast.solving import check

    check(problem, options_of(config))
    if on_groups(problem, config):  # which forms neither W nor H
        return
    rows = problem.rows(problem.reduction(config["reduce"])).number
    least, free = (
        4 * problem.entries(rows) * compute_dtype(problem.torch_dtype).itemsize // ranks,
        available_bytes(torch.device(problem.device)),
    )
    if least > free:
        raise InputError(
            f"not enough memory: classes, dim and rows need {least / 1e9:.3g} GB at least and "
            f"{free / 1e9:.3g} GB are free; "
            "ask ufm-fast plan, and make it smaller"
        )


# ---- a run that goes on
# ----------------------------------------------------------------------------------------------


def resume(
    path: Path, given: Mapping[str, Any], file: Path | None, ranks: int = 0
) -> Job | RunDirectory:
    """The job that continues a run; the run itself if it is finished. ``ranks``: on so many, each
    of which calls it.

    Errors: InputError for flags that contradict the run, except those that do not change which
    minimum is sought; for a configuration that is not the one the run was made with; for a smaller
    tol of the closed form.
    """
    from ufm_fast.runs.grouped import saved_data
    from ufm_fast.runs.state import data_arguments

    run = RunDirectory.open(path, "resume")
    stamp = run.stamp()
    run.config = settings.read_saved(run.config, path)
    config = _changed(run.config, given, file)
    asked = _of_ranks(config) if ranks else {}
    check_choices(config | asked)
    grouped = saved_data(run)
    if grouped is not None:
        if ranks:
            raise InputError(
                f"resume: {path} was solved on groups, which takes one process; go on without "
                f"torchrun"
            )
        return _resumed_groups(run, config, grouped, stamp)
    saved = (
        _saved(run, ranks) if run.has_state else None
    )  # there is none if it was killed before the first save
    data = settings.read_data(config) if saved is None else data_arguments(saved.tensors)
    _check_hash(run, data)
    if (
        saved is not None
        and finished(run, config, saved.progress.step)
        and (ranks or not _unproved(run, config))
    ):
        if config["method"] == "closed-form" and config["tol"] < run.config["tol"]:
            raise InputError(
                f"tol = {config['tol']:g} asks for steps, and {path} was solved by the closed "
                f"form, which takes none; "
                "add --method auto to go on from its point, or drop tol"
            )
        return run
    config["device"], note = settings.pick_device(config["device"])
    notes = [note] if note else []
    problem = settings.build_problem(config, data)
    check_solvable(problem, config | asked, ranks or 1)
    rest: dict[str, Any] = {"notes": notes, "fresh": False, "stamp": stamp, "asked": asked}
    if saved is None:
        return Job(problem, config, run, given_point(problem, config), **rest)
    point = partial(saved.point, problem)
    if ranks:
        rest["saved"] = point
    # The closed form starts nowhere.
    start = None if ranks or config["method"] == "closed-form" else point()
    job = Job(problem, config, run, start, saved.progress, **rest)
    if config["restarts"] > 1:
        notes.append(_of_starts(job))
    return job


class _Saved(NamedTuple):
    """A state that was read: the data, how far it had come, and what makes its point once there is
    a problem.
    """

    tensors: dict[str, Any]
    progress: Progress
    point: Callable[[Problem], Point]


def _saved(run: RunDirectory, ranks: int) -> _Saved:
    from ufm_fast.layout import Layout, Mesh
    from ufm_fast.runs.shards import spread_point
    from ufm_fast.runs.state import fitting_point, load_rest, load_state

    if not ranks:
        tensors, progress, reduce = load_state(run)
        return _Saved(
            tensors,
            progress,
            lambda problem: fitting_point(run, problem, tensors, reduce, "resume"),
        )
    tensors, progress, reduce, shards = load_rest(run)

    def blocks(problem: Problem) -> Point:
        layout = Layout(
            Mesh.of_world(None, problem.device), problem.num_classes, problem.rows(reduce).number
        )
        return spread_point(run.path, shards, problem, layout)

    return _Saved(tensors, progress, blocks)


def _resumed_groups(
    run: RunDirectory, config: Config, saved: tuple[dict[str, Any], int], stamp: tuple[int, ...]
) -> Job | RunDirectory:
    """A run that was solved on groups is finished, or solved anew: it takes seconds."""
    from ufm_fast.runs.state import Progress

    data, step = saved
    _check_hash(run, data)
    if finished(run, config, step):
        return run
    config["device"], note = settings.pick_device(config["device"])
    problem = settings.build_problem(config, data)
    check_solvable(problem, config)
    return Job(
        problem, config, run, None, Progress(), [note] if note else [], fresh=False, stamp=stamp
    )


def _of_starts(job: Job) -> str:
    """What a run with restarts goes on with."""
    number, starts = job.config["restarts"], job.progress.starts
    if job.restarts > 1 and starts is not None:
        return f"goes on with start {len(starts.done) + 1} of {number}"
    begun = len(_ended_starts(job))
    some = f"{begun} of {number} starts" if begun else f"some of {number} starts"
    return (
        f"goes on from the best point of {some}, and begins no other; solve into another --out "
        f"for more"
    )


def _ended_starts(job: Job) -> Sequence[Any]:
    """The rows of the starts that earlier runs have ended, of the state or of a summary from before
    those were kept there.
    """
    if job.progress.starts is not None:
        return [asdict(row) for row in job.progress.starts.done]
    rows: Sequence[Any] = (job.run.summary or {}).get("restarts", ())
    return rows


def _check_hash(run: RunDirectory, data: Mapping[str, Any]) -> None:
    """Errors: InputError where configuration or data are not those that the run's hash was made
    of.
    """
    if run.hash not in settings.hashes(
        run.config, settings.build_problem({**run.config, "device": "cpu"}, data)
    ):
        raise InputError(
            f"resume: the hash in {run.path / 'config.json'} is not that of its settings and "
            f"data, so one of them was changed "
            "after the run was made; undo that, or solve the changed problem into another --out "
            "(-c FILE takes settings)"
        )


def finished(run: RunDirectory, config: Mapping[str, Any], step: int) -> bool:
    """Whether the run's summary is a success at a tolerance no larger than that of ``config``, and
    about the state that is saved, which has come to ``step``: a resume that was killed has gone
    further, and may have a smaller tol in its config.json.
    """
    summary = run.summary
    if (
        summary is None
        or summary.get("outcome") not in ("converged", "stalled")
        or summary.get("steps") != step
    ):
        return False
    if "method" not in summary:
        return False
    if summary.get("method") == "closed-form":
        return bool(config["method"] == "closed-form")
    reached = summary.get("tol")
    return isinstance(reached, float) and bool(config["tol"] >= reached)


def _unproved(run: RunDirectory, config: Mapping[str, Any]) -> bool:
    """Whether ranks have solved it that had no room for a certificate."""
    summary = run.summary or {}
    proof = summary.get("certificate") or {}
    return bool(
        config["certificate"]
        and str(summary.get("backend")).startswith("sharded")
        and proof.get("kind") == "none"
    )


def _changed(config: Config, given: Mapping[str, Any], file: Path | None) -> Config:
    content = {} if file is None else settings.read_toml(file)
    wanted = {
        **content,
        **{key: settings.typed(key, value) for key, value in given.items() if value is not None},
    }
    for name, value in wanted.items():
        if not SETTINGS[name].resume and config[name] != value:
            allowed = ", ".join(resumable())
            raise InputError(
                f"{name} = {value!r} contradicts the run, which has {config[name]!r}; drop it (a "
                f"resumed run may "
                f"change {allowed}) or solve into another --out"
            )
    changed = dict(config)
    settings.lay_over(
        changed, {name: value for name, value in wanted.items() if SETTINGS[name].resume}
    )
    return changed


# ---- running
# --------------------------------------------------------------------------------------------------


def execute(job: Job, report: Callable[[StepRecord], None], **told: Any) -> Solution:
    """Solve, log and save. A refused solve leaves no run directory; an interrupted one leaves its
    latest point. ``told``: of ``solve``, its ``callbacks`` and its ``watch``.

    Errors: InputError where another process writes to the run, or has gone on with it since it was
    read.
    """
    with job.run.locked(job.stamp):
        return _execute(job, report, told)


def execute_groups(job: Job) -> dict[str, Any]:
    """Solve a job that is ``grouped``, log and save; the summary. A refused or interrupted one
    leaves no run directory.
    """
    from ufm_fast.runs.grouped import solve_groups

    with job.run.locked(job.stamp):
        try:
            if not job.fresh:
                job.run.write_config(job.config, settings.digest(job.config, job.problem))
            summary = solve_groups(job.run, job.problem, job.config["tol"])
        except BaseException:
            if job.fresh:
                job.run.discard()
            raise
        job.run.write_summary({**summary, "tol": job.config["tol"], "hash": job.run.hash})
    return summary


def _execute(job: Job, report: Callable[[StepRecord], None], told: Mapping[str, Any]) -> Solution:
    import torch

    from ufm_fast.memory import begin_peak, peak_memory
    from ufm_fast.runs.log import Log
    from ufm_fast.solving import solve

    log, device = Log(job, report), torch.device(job.problem.device)
    held = begin_peak(device)
    try:
        solution: Solution = solve(
            job.problem, **_arguments(job), **told, on_log=log, on_save=log.save
        )
    except BaseException as error:
        log.leave(saving=isinstance(error, KeyboardInterrupt))
        raise
    log.finish(solution)
    before = () if job.fresh or solution.restarts else _ended_starts(job)
    restarts = {"restarts": before} if before else {}
    memory = peak_memory(device, held)
    job.run.write_summary(
        {**solution.summary(), **restarts, **memory, "tol": job.config["tol"], "hash": job.run.hash}
    )
    return solution


def _arguments(job: Job) -> dict[str, Any]:
    from ufm_fast.solvers.solution import Effort

    config = job.config
    return {
        **{name: config[name] for name in taken_by("solve")},
        **job.asked,
        "start": "spectral"
        if config["method"] == "closed-form" and not job.fresh
        else config["start"],
        "reduce": job.reduce,
        "restarts": job.restarts,
        "starts": job.progress.starts if job.restarts > 1 else None,
        "initial": job.start,
        "spent": Effort(job.progress.step, job.progress.evaluations, job.progress.seconds),
    }


@contextmanager
def terminate_like_interrupt() -> Iterator[None]:
    """SIGTERM, SIGUSR2 and SIGHUP raise KeyboardInterrupt inside, so that a batch system's kill,
    its warning before, or a terminal that is closed, saves the run as Ctrl-C does. A SIGHUP that is
    ignored stays so: that is what nohup does.
    """
    if threading.current_thread() is not threading.main_thread():  # signals can be set there only
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in ending_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals() -> list[int]:
    """The signals that end a process from outside, beside Ctrl-C, and are not ignored."""
    numbers = [
        getattr(signal, name) for name in ("SIGTERM", "SIGUSR2", "SIGHUP") if hasattr(signal, name)
    ]
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
