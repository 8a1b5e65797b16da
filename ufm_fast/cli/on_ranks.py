"""``torchrun --nproc-per-node N -m ufm_fast solve ..``: every rank runs the command, and the first
one speaks.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ufm_fast.cli.app import BAD_INPUT, FAILED, INTERRUPTED
from ufm_fast.cli.solve import Shown, run_job
from ufm_fast.errors import InputError
from ufm_fast.runs import ranks as several
from ufm_fast.runs.directory import RunDirectory
from ufm_fast.runs.words import printable, quoted

if TYPE_CHECKING:
    from ufm_fast.runs.job import Job

#: Figures of larger points are left to ``ufm-fast plot``: they need W and H whole.
_DRAWN = 1 << 24


def solve_on_ranks(
    given: Mapping[str, Any],
    file: Path | None,
    out: Path | None,
    resume: Path | None,
    shown: Shown,
) -> int:
    """`solve.solve` on this rank; returns the exit code, the same on all."""
    run: Path | None = resume
    try:
        with several.joined() as here, several.stopping_together():
            if resume is not None and out is not None:
                raise several.RefusedError(
                    "out and resume contradict one another: a resumed run stays where it is; drop "
                    "--out"
                )
            job = (
                several.prepare(here, given, file, out)
                if resume is None
                else several.resume(here, resume, given, file)
            )
            run, small = (
                (job.path, False)
                if isinstance(job, RunDirectory)
                else (job.run.path, _is_small(job))
            )
            own = (
                replace(shown, plots=shown.plots and small)
                if here.first
                else Shown(quiet=True, plots=False)
            )
            try:
                code = run_job(lambda: job, own, speaks=here.first)
            except KeyboardInterrupt:
                code = INTERRUPTED
                if here.first:
                    sys.stderr.write("interrupted\n")
        return code
    except several.RefusedError as error:
        sys.stderr.write(f"error: {printable(str(error))}\n")
        sys.stderr.flush()
        several.leave()
        return BAD_INPUT
    except InputError:
        raise
    except Exception as error:
        if not several.is_loss(error):
            raise
        sys.stderr.write(f"error: {printable(_lost(run))}\n")
        return FAILED


def _is_small(job: Job) -> bool:
    return job.problem.entries(job.problem.rows(job.reduce).number) <= _DRAWN


def _lost(run: Path | None) -> str:
    if run is None or not (run / "state.safetensors").exists():
        return "another rank has ended, so this one ends too; nothing was saved yet"
    again = f"torchrun .. -m ufm_fast solve --resume {quoted(run)}"
    return (
        f"another rank has ended, so this one ends too; what was saved last goes on, with any "
        f"number of ranks, by: {again}"
    )
