"""A job that is solved, logged and saved, also when it is interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ufm_fast.runs import settings
from ufm_fast.runs.options import taken_by

if TYPE_CHECKING:
    from ufm_fast.runs.job import Job
    from ufm_fast.solvers.solution import Solution, StepRecord


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
    import torch

    from ufm_fast.memory import begin_peak, peak_memory
    from ufm_fast.runs.grouped import solve_groups

    device = torch.device("cpu")  # wherever the problem is: what is solved fits anywhere
    with job.run.locked(job.stamp):
        held = begin_peak(device)
        try:
            if not job.fresh:
                job.run.write_config(job.config, settings.digest(job.config, job.problem))
            summary = solve_groups(job.run, job.problem, job.config["tol"])
        except BaseException:
            if job.fresh:
                job.run.discard()
            raise
        memory = peak_memory(device, held)
        job.run.write_summary({**summary, **memory, "tol": job.config["tol"], "hash": job.run.hash})
    return summary


def _execute(job: Job, report: Callable[[StepRecord], None], told: Mapping[str, Any]) -> Solution:
    import torch

    from ufm_fast.memory import begin_peak, peak_memory
    from ufm_fast.runs.log import Log
    from ufm_fast.runs.resuming import ended_starts
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
    before = () if job.fresh or solution.restarts else ended_starts(job)
    restarts = {"restarts": before} if before else {}
    memory = peak_memory(device, held)
    resumed = {} if job.fresh else {"resumed_at": job.progress.step}
    of_run = {**memory, **resumed, "tol": job.config["tol"], "hash": job.run.hash}
    job.run.write_summary({**solution.summary(), **restarts, **of_run})
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
