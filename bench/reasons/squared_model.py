"""Gradient evaluations of the squared error with and without the model of `curvature.squares`. No
clock.

Twelve classes of 1 to 100 samples, d = 11, 12 and 5, a free bias and none, lambda_W = lambda_H from
1e-5 to 1e-8, float64, a random start, L-BFGS with its Newton-CG finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.solvers.curvature import squares

COUNTS = [3, 100, 30, 1, 5, 1, 5, 1, 100, 100, 2, 1]


def records() -> Iterator[Record]:
    for dim, bias in ((12, "none"), (12, "free"), (11, "free"), (5, "free")):
        for penalty in (1e-5, 1e-6, 1e-7, 1e-8):
            problem = Problem(
                counts=COUNTS, dim=dim, loss="mse", bias=bias, lambda_w=penalty, lambda_h=penalty
            )
            for name, serves in (
                ("identity", lambda row, objective: False),
                ("squared_model", squares.Squares.serves),
            ):
                with patch.object(squares.Squares, "serves", serves):
                    solution = solve(problem, start="normal", metrics=False)
                yield Record(
                    {"dim": dim, "bias": bias, "penalty": penalty},
                    {"evaluations": solution.evaluations, "value": f"{solution.value:.10e}"},
                    name,
                )
