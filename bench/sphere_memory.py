"""Many classes on the sphere: seconds and peak memory of a step of L-BFGS with five pairs, and of
all linear metrics.

python bench/sphere_memory.py [--classes 100000] [--dim 128] [--steps 1] [--out FILE.csv]

Cross-entropy of unit rows, t = 10, float32, one row a class (K = N), from a normal start. Peaks are
above what the process held before, in a process of its own whose C library hands back what is freed
(MALLOC_MMAP_THRESHOLD_); the bound is 22 vectors of (N + K) d numbers plus 200 MB. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, peak_rss_bytes, reset_peak, write_csv

from ufm_fast import Problem, solve
from ufm_fast.metrics import collect

HISTORY, TEMPERATURE = 5, 10.0
VECTORS, BESIDE = 22, 200e6


def solution_of(classes: int, dim: int, steps: int):
    problem = Problem(
        classes=classes, dim=dim, constraint="sphere", temperature=TEMPERATURE, dtype="float32"
    )
    options = {
        "method": "lbfgs",
        "history": HISTORY,
        "start": "normal",
        "certificate": False,
        "metrics": False,
    }
    return solve(problem, max_steps=steps, **options)


def measured(classes: int, dim: int, steps: int) -> list[dict[str, object]]:
    """A row for the step and one for the metrics."""
    solution_of(50, 8, 2)  # imports
    reset_peak()
    before = peak_rss_bytes()
    vector = 2 * classes * dim * 4

    def row(what: str, seconds: float) -> dict[str, object]:
        peak = peak_rss_bytes() - before
        bound = VECTORS * vector + BESIDE
        return {
            "K": classes, "d": dim, "what": what, "seconds": round(seconds, 1),
            "peak_MB": round(peak / 1e6), "vectors": round(peak / vector, 1),
            "bound_MB": round(bound / 1e6), "within": peak <= bound,
        }  # fmt: skip

    began = time.perf_counter()
    solution = solution_of(classes, dim, steps)
    name = (
        f"L-BFGS, {solution.steps} step{'s' * (solution.steps > 1)}, {solution.evaluations:g} "
        f"evaluations"
    )
    rows = [row(name, time.perf_counter() - began)]
    began = time.perf_counter()
    collect(
        solution.point.H, solution.point.W, solution.problem.rows().targets.indices, pairwise="none"
    )
    return [*rows, row("linear metrics", time.perf_counter() - began)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measured(args.classes, args.dim, args.steps)))
        return
    print(environment(), flush=True)
    command = [
        sys.executable,
        __file__,
        "--child",
        *(f"--{name}={getattr(args, name)}" for name in ("classes", "dim", "steps")),
    ]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if ran.returncode:
        raise SystemExit(ran.stderr)
    rows = json.loads(ran.stdout)
    for row in rows:
        print(row)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
