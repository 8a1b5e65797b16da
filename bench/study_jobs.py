"""A study of 40 small cells with --jobs 2 against --jobs 1, and what a cell costs beside its solve
(start, save, table).

One thread a cell in both: small cells gain nothing by a second, and on a busy machine its waiting
costs them much.

python bench/study_jobs.py [--rounds 1] [--out FILE.csv]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import rounds_and_out, write_csv

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


def main() -> None:
    args = rounds_and_out(__doc__, 1)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(args.rounds):
            (one, cell), (two, _) = (timed(Path(scratch), jobs, number) for jobs in (1, 2))
            rows.append(
                {
                    "round": number,
                    "jobs_1_seconds": round(one, 2),
                    "jobs_2_seconds": round(two, 2),
                    "ratio": round(two / one, 3),
                    "beside_the_solve_of_a_cell": round(cell, 2),
                    "load_average": round(os.getloadavg()[0], 1),
                }
            )
            print(rows[-1], flush=True)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
