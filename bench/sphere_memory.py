"""Many classes on the sphere: seconds and peak memory of a step of L-BFGS with five pairs, and of
all linear metrics.

Cross-entropy of unit rows, t = 10, float32, one row a class (K = N), from a normal start. Peaks are
above what the process held before, in a process of its own that hands back what is freed; the bound
is 22 vectors of (N + K) d numbers plus 200 MB. Linux.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.measure import in_child, peak_rss_bytes, reset_peak
from bench.table import Record
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
    """A row for the step and one for the metrics, in this process."""
    solution_of(50, 8, 2)  # imports
    reset_peak()
    before = peak_rss_bytes()
    vector = 2 * classes * dim * 4

    def row(what: str, seconds: float) -> dict[str, object]:
        peak = peak_rss_bytes() - before
        bound = VECTORS * vector + BESIDE
        return {
            "what": what, "seconds": round(seconds, 1), "peak_MB": round(peak / 1e6),
            "vectors": round(peak / vector, 1), "bound_MB": round(bound / 1e6),
            "within": peak <= bound,
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


def records(classes: int = 100_000, dim: int = 128, steps: int = 1) -> Iterator[Record]:
    for row in in_child("bench.sphere_memory", "measured", classes, dim, steps):
        what = row.pop("what")
        yield Record({"K": classes, "d": dim}, row, what)
