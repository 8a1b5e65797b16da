"""Solves with layers, from random starts: how many find the minimum that theory knows, how near, in
how many evaluations.

A row a problem: ``hits`` are the starts that end within ``tolerance`` of the reference (relative),
``worst`` is the largest relative distance among the ``needed`` best ones. ``reached`` is the most
evaluations after which a start was within the tolerance for good, ``evaluations`` the most that a
start took to the end, a relative gradient of 1e-10; of ReLUs, whose stages minimise something else,
both are the end. The reference is a closed form (squared error; of ReLUs that of deep neural
collapse), the value of a known code (cross-entropy), or the best start itself, where starts are
only asked to agree. ``met`` compares hits and ``reached`` with what a row asks for.

``--only WORD``: cases whose name holds it. Not met: narrow ReLU layers that should agree. Under
cross-entropy, K = 4, width 14, one of five starts ends 26 % above the other four; with a free bias,
K = 4, width 14, four of five end up to 1.3 % above the best, K = 10, width 20, three up to 2 %. At
K = 30 stages of 300 steps are too few for a ReLU's gradient to vanish: values are right to 1e-9,
the outcome is ``kink``. A looser end of the early stages changes nothing there, for each runs into
its 300 steps; a history of 40 pairs brings the value from 6e-11 to 9e-13 (one start), and the
outcome is the same.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.table import Record
from ufm_fast import Problem, Solution, solve
from ufm_fast.solvers.solution import Restart, StepRecord
from ufm_fast.theory import closed_form

LAMBDA = 2.0**-10


@dataclass(frozen=True)
class Case:
    """``needed`` of ``starts`` within ``tolerance`` of ``value`` (None: of the best), each within
    ``evaluations``.

    ``below``: the best start is at most that share of ``value``, in place of the tolerance.
    """

    name: str
    problem: dict[str, Any]
    starts: int
    needed: int
    evaluations: float
    value: float | None = None
    tolerance: float = 1e-8
    start: str = "orthogonal"
    below: float | None = None


def mse(
    K: int | list[int], n: int, dim: int, lam: float, layers: int, **more: Any
) -> dict[str, Any]:
    data = {"counts": K} if isinstance(K, list) else {"classes": K, "per_class": n}
    return {
        **data,
        "dim": dim,
        "lambda_w": lam,
        "lambda_h": lam,
        "layers": layers,
        "loss": "mse",
        **more,
    }


def ce(K: int, width: int, layers: int, n: int = 5) -> dict[str, Any]:
    return {
        "classes": K,
        "per_class": n,
        "dim": width,
        "lambda_w": LAMBDA,
        "lambda_h": LAMBDA,
        "layers": layers,
    }


def linear() -> Iterator[Case]:
    for M in (3, 6, 9):
        for counts in ([100] * 4, [200, 100, 50, 50]):
            yield Case(
                f"linear mse, M={M}, counts {counts}", mse(counts, 1, 64, 5e-4, M), 10, 10, 500
            )
    for K, n, d, lam in ((4, 50, 20, 5e-3), (10, 5, 20, 5e-4), (30, 1, 40, 1e-4)):
        yield Case(f"linear mse, M=2, K={K}", mse(K, n, d, lam, 2), 10, 10, 500)
    yield Case("linear mse, M=2, K=100", mse(100, 1, 128, 1e-5, 2), 4, 4, 500)
    for M, counts in ((2, [9, 5, 3, 2]), (3, [40, 20, 10, 5, 5])):
        yield Case(
            f"linear mse, free bias, M={M}", mse(counts, 1, 12, 1e-3, M, bias="free"), 8, 7, 500
        )
    for M, counts in ((2, [5] * 8), (3, [12, 9, 7, 5, 3, 2])):
        yield Case(
            f"linear mse, d=4 < K={len(counts)}, M={M}", mse(counts, 1, 4, 1e-3, M), 10, 10, 500
        )
    yield Case("linear mse, M=2, K=1000", mse(1000, 1, 1024, 1e-7, 2), 1, 1, 200)


def cross_entropy() -> Iterator[Case]:
    known = {
        (4, 2, 8): 0.030227583872, (6, 2, 10): 0.047254377284, (8, 2, 12): 0.063656738018,
        (10, 2, 14): 0.080012659245, (4, 3, 8): 0.023657636972, (10, 3, 12): 0.058705223845,
    }  # fmt: skip
    for (K, M, width), value in known.items():
        yield Case(f"linear ce, K={K}, M={M}", ce(K, width, M), 10, 1, 300, value, start="normal")


def rectified() -> Iterator[Case]:
    relu = {"activation": "relu"}
    for M, K, width, lam in (
        (2, 4, 20, 5e-3),
        (2, 10, 30, 1e-3),
        (2, 30, 64, 1e-4),
        (3, 6, 14, 5e-3),
        (3, 10, 30, 1e-3),
    ):
        yield Case(
            f"relu mse, M={M}, K={K}",
            mse(K, 1, width, lam, M, **relu),
            5,
            1,
            3000,
            None,
            1e-9,
            "normal",
        )
    for counts in ([8, 4, 2, 1], [50, 20, 10, 5, 2, 1]):
        problem = mse(counts, 1, 20, 1e-3, 2, **relu)
        yield Case(f"relu mse, M=2, counts {counts}", problem, 5, 1, 3000, None, 1e-9, "normal")
    problem = mse(10, 1, 30, 4e-3, 4, **relu)
    yield Case("relu mse, M=4, K=10", problem, 10, 1, 5000, None, start="normal", below=0.93)
    for loss, bias in (("ce", "none"), ("mse", "free")):
        for K, width, lam, words in (
            (4, 20, 5e-3, ""),
            (10, 30, 1e-3, ""),
            (4, 14, LAMBDA, ", narrow"),
            (10, 20, 1e-3, ", narrow"),
        ):
            problem = {**mse(K, 1, width, lam, 2, **relu), "loss": loss, "bias": bias}
            name = f"relu {loss}, bias {bias}, M=2, K={K}{words}: agree"
            yield Case(name, problem, 5, 5, 5000, start="normal")


CASES = (*linear(), *cross_entropy(), *rectified())


def reference(case: Case, problem: Problem, solution: Solution) -> float:
    if case.value is not None:
        return case.value
    theory = closed_form(
        replace(problem, activation="linear")
    )  # of a ReLU deep neural collapse, whose frame is non-negative
    return solution.value if theory is None or case.name.endswith("agree") else theory.value


def reached(
    records: list[StepRecord], starts: Sequence[Restart | Solution], case: Case, value: float
) -> float:
    """The most evaluations after which a start stayed within the tolerance; its end, where it never
    did, or has stages.
    """
    if case.problem.get("activation") == "relu":
        return max(start.evaluations for start in starts)
    most = before = 0.0
    for start in starts:
        end = before + start.evaluations
        entered = None
        for record in records:
            if before < record.evaluations <= end:
                near = abs(record.value / value - 1) <= case.tolerance
                entered = (entered or record.evaluations) if near else None
        most, before = max(most, (entered or end) - before), end
    return most


def result(case: Case) -> dict[str, object]:
    """The row of a case."""
    begin, problem = time.perf_counter(), Problem(**case.problem)
    records: list[StepRecord] = []
    solution = solve(
        problem,
        start=case.start,
        restarts=case.starts,
        metrics=False,
        certificate=False,
        log_metrics=False,
        log_every=1,
        on_log=lambda record, _: records.append(record),
    )
    starts = solution.restarts or (solution,)
    value = reference(case, problem, solution)
    to_value = reached(records, starts, case, value)
    ratios = sorted(row.value / value for row in starts)
    hits = sum(abs(ratio - 1) <= case.tolerance for ratio in ratios)
    most = max(row.evaluations for row in starts)
    outcomes = {str(getattr(row.outcome, "value", row.outcome)) for row in starts}
    met = ratios[0] <= case.below if case.below else hits >= case.needed
    return {
        "case": case.name,
        "start": case.start,
        "starts": case.starts,
        "reference": f"{value:.15g}",
        "best_over_reference": f"{ratios[0]:.15g}",
        "worst": f"{max(abs(r - 1) for r in ratios[: case.needed]):.1e}",
        "tolerance": case.tolerance,
        "hits": hits,
        "needed": case.needed,
        "reached": f"{to_value:g}",
        "evaluations": f"{most:g}",
        "allowed": case.evaluations,
        "outcomes": " ".join(sorted(outcomes)),
        "met": met and to_value <= case.evaluations,
        "seconds": f"{time.perf_counter() - begin:.1f}",
    }


def records(only: str = "") -> Iterator[Record]:
    for case in CASES:
        if only in case.name:
            row = result(case)
            yield Record({name: row.pop(name) for name in ("case", "start", "starts")}, row)
