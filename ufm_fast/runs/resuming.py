"""A run that goes on: what it has saved, and what may be changed of it.

Decisions

2026-11-26. What a resume changes is written at its first log point, when `solve` can refuse no
more, and `summary.json` keeps the tolerance that was reached: a resumed run that died had counted
as finished. The hash is made anew from the settings in force and compared, so edited settings are
refused. A start's rows are matched with the problem's by their labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.job import Job, check_choices, check_solvable, given_point, of_ranks
from ufm_fast.runs.model import is_network
from ufm_fast.runs.options import SETTINGS, resumable
from ufm_fast.runs.settings import Config
from ufm_fast.runs.words import quoted

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.problem import Problem
    from ufm_fast.runs.state import Progress


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
    if is_network(run):
        raise InputError(
            f"resume: {path} is a run of ufm-fast train; go on with: ufm-fast train --resume "
            f"{quoted(path)}"
        )
    stamp = run.stamp()
    run.config = settings.read_saved(run.config, path)
    config = _changed(run.config, given, file)
    asked = of_ranks(config) if ranks else {}
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
        rest["saved"] = point, saved.check
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
    check: Callable[[Point], None] = lambda _: None  # of ranks, once all have the point


def _saved(run: RunDirectory, ranks: int) -> _Saved:
    from ufm_fast.layout import Layout, Mesh
    from ufm_fast.runs.shards import check_spread, spread_point
    from ufm_fast.runs.state import fitting_point, load_rest, load_state

    if not ranks:
        tensors, progress, reduce = load_state(run)
        return _Saved(
            tensors,
            progress,
            lambda problem: fitting_point(run, problem, tensors, reduce, "resume"),
        )
    tensors, progress, reduce, blocks = load_rest(run)

    def point(problem: Problem) -> Point:
        layout = Layout(
            Mesh.of_world(None, problem.device), problem.num_classes, problem.rows(reduce).number
        )
        hidden = [name for name in tensors if name.startswith("hidden")]
        layers = tuple(tensors[f"hidden{j}"] for j in range(1, len(hidden) + 1))
        return spread_point(run.path, blocks, problem, layout, layers)

    return _Saved(tensors, progress, point, partial(check_spread, run.path, blocks))


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
    begun = len(ended_starts(job))
    some = f"{begun} of {number} starts" if begun else f"some of {number} starts"
    return (
        f"goes on from the best point of {some}, and begins no other; solve into another --out "
        f"for more"
    )


def ended_starts(job: Job) -> Sequence[Any]:
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
