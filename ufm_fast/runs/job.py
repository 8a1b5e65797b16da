"""A configuration that becomes a job: its problem checked, its run directory made.

    job = prepare({"classes": 10, "dim": 16}, None, Path("run"))
    solution = running.execute(job, lambda record: None)

`resuming` makes the job of a run that goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ufm_fast.errors import InputError
from ufm_fast.runs import settings
from ufm_fast.runs.directory import RunDirectory, refuse_occupied
from ufm_fast.runs.options import taken_by
from ufm_fast.runs.settings import Config
from ufm_fast.runs.words import quoted

if TYPE_CHECKING:
    from ufm_fast.point import Point
    from ufm_fast.problem import Problem
    from ufm_fast.runs.state import Progress
    from ufm_fast.solvers.options import SolveOptions


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
    # Of ranks: where a run goes on, which all must read together, and then whether it is whole.
    saved: tuple[Callable[[], Point], Callable[[Point], None]] | None = None

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
    asked = of_ranks(config) if ranks else {}
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


def of_ranks(config: Config) -> dict[str, Any]:
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
