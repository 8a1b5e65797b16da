"""Peak memory of every method's steps against what `ufm-fast plan` says of them, each in a process
of its own.

In multiples of the parameters' bytes P, above what the process held before. The C library must hand
back what is freed (`measure.in_child`). Linux.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.measure import in_child, peak_rss_bytes, reset_peak
from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.plan import make_plan

METHODS = (
    "gd",
    "momentum",
    "nesterov",
    "sign",
    "spectral",
    "adam",
    "lbfgs",
    "newton-cg",
)  # alternating holds d x d matrices beside


def peak(
    method: str, loss: str, start: str, classes: int, dim: int, steps: int
) -> dict[str, float]:
    """Bytes of the parameters, of the plan, and of a run; imbalanced, for equal counts would save a
    copy of the features.
    """

    def problem(dim: int) -> Problem:
        return Problem(
            counts=[5 + 3 * k % 7 for k in range(classes)],
            dim=dim,
            loss=loss,
            lambda_w=1e-3,
            lambda_h=1e-5,
        )

    def run(dim: int, steps: int) -> None:
        solve(
            problem(dim),
            method=method,
            max_steps=steps,
            start=start,
            certificate=False,
            metrics=False,
        )

    run(min(2 * classes, dim), 3)  # imports and buffers
    reset_peak()
    before = peak_rss_bytes()
    run(dim, steps)
    plan = make_plan(problem(dim), method=method)
    return {
        "P": plan.parameters,
        "planned": plan.steps(method, "tiled"),
        "measured": peak_rss_bytes() - before,
    }


def records(
    classes: int = 100, dim: int = 60000, steps: int = 45, loss: str = ""
) -> Iterator[Record]:
    every = [("ce", "normal"), ("ce", "spectral"), ("mse", "normal")]
    for name, start in [(loss, "normal")] if loss else every:
        for method in METHODS:
            found = in_child("bench.memory", "peak", method, name, start, classes, dim, steps)
            sizes = {
                f"{key}_parameters": round(found[key] / found["P"], 1)
                for key in ("planned", "measured")
            }
            case = {"loss": name, "start": start, "classes": classes, "dim": dim}
            yield Record(case, sizes, method)
