"""A study of 40 small cells with --jobs 2 against --jobs 1, and what a cell costs beside its solve
(start, save, table).

One thread a cell in both: small cells gain nothing by a second, and on a busy machine its waiting
costs them much.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.table import Record
from ufm_fast.studies.folder import StudyFolder, toml_text
from ufm_fast.studies.table import read_rows

CONTENT = {
    "solve": {
        "classes": 100,
        "dim": 32,
        "start": "normal",
        "device": "cpu",
        "method": "gd",
        "max_steps": 200,
    },
    "axes": {"seed": {"range": [0, 40]}},
}


def timed(scratch: Path, jobs: int, number: int) -> tuple[float, float]:
    """Seconds of the command, and of it those that a cell takes beside its solve."""
    file, folder = scratch / "study.toml", scratch / f"out-{jobs}-{number}"
    file.write_text(toml_text(CONTENT), "utf-8")
    words = ["study", str(file), "--out", str(folder), "--jobs", str(jobs), "--quiet", "--no-plots"]
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "ufm_fast.cli", *words],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    seconds = time.perf_counter() - began
    solving = sum(row["seconds"] for row in read_rows(StudyFolder.open(folder)))
    return seconds, (seconds * jobs - solving) / 40


def records(rounds: int = 1) -> Iterator[Record]:
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            (one, cell), (two, _) = (timed(Path(scratch), jobs, number) for jobs in (1, 2))
            yield Record(
                {"round": number},
                {
                    "jobs_1_seconds": round(one, 2),
                    "jobs_2_seconds": round(two, 2),
                    "ratio": round(two / one, 3),
                    "beside_the_solve_of_a_cell_seconds": round(cell, 2),
                    "load_average": round(os.getloadavg()[0], 1),
                },
            )
