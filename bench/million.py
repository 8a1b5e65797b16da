"""Squared error at K = N = 1,000,000, d = 128, float32: seconds a step, seconds for the metrics,
peak memory of the process so far.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from bench.measure import peak_rss_bytes
from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.metrics import collect

OPTIONS: dict[str, dict[str, Any]] = {"gd": {"learning_rate": 1.0}, "lbfgs": {"history": 3}}


def records(
    classes: int = 1_000_000, dim: int = 128, steps: int = 5, methods: str = "gd,alternating,lbfgs"
) -> Iterator[Record]:
    def record(what: str, seconds: float) -> Record:
        peak = round(peak_rss_bytes() / 1e9, 2)
        return Record(
            {"K": classes, "d": dim}, {"seconds": round(seconds, 2), "peak_GB": peak}, what
        )

    penalties = {"lambda_w": 1e-7, "lambda_h": 1e-7}
    problem = Problem(classes=classes, dim=dim, loss="mse", dtype="float32", **penalties)
    plain: dict[str, Any] = {"start": "normal", "certificate": False, "metrics": False}
    for method in methods.split(","):
        options = {**plain, **OPTIONS.get(method, {})}
        solution = solve(problem, method=method, max_steps=steps, **options)
        yield record(method, solution.seconds / max(solution.steps, 1))
    began = time.perf_counter()
    labels = problem.rows().targets.indices
    collect(solution.point.H, solution.point.W, labels, **penalties, pairwise="none")
    yield record("metrics", time.perf_counter() - began)
