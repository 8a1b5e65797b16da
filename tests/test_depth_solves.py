"""Solves with layers, from random starts: the smallest of bench/depth.py's rows, with fewer
starts.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.depth import CASES, result
from ufm_fast import Problem, solve

#: Starts, and how many of them have to reach the reference.
SMALL = {
    "linear mse, M=2, K=4": (3, 3),
    "linear mse, d=4 < K=8, M=2": (3, 3),
    "linear mse, free bias, M=2": (3, 2),
    "linear ce, K=4, M=2": (4, 1),
    "linear ce, K=4, M=3": (4, 1),
    "relu mse, M=2, K=4": (2, 1),
    "relu mse, M=2, counts [8, 4, 2, 1]": (2, 1),
}


@pytest.mark.parametrize("name", SMALL)
def test_random_starts_reach_the_minimum(name: str) -> None:
    starts, needed = SMALL[name]
    row = result(
        replace(next(case for case in CASES if case.name == name), starts=starts, needed=needed)
    )
    assert row["met"], row


def test_rounding_the_kinks_finishes_what_the_exact_relu_does_not() -> None:
    problem = Problem(
        classes=4,
        per_class=1,
        dim=20,
        layers=2,
        activation="relu",
        loss="mse",
        lambda_w=5e-3,
        lambda_h=5e-3,
    )
    staged, plain = (
        solve(problem, start="normal", method=method, max_steps=600, metrics=False)
        for method in ("auto", "lbfgs")
    )
    reference = 0.0297986454803936
    assert abs(staged.value / reference - 1) < 1e-13
    assert staged.outcome.value == "converged"
    assert plain.value / reference - 1 > 1e-13  # which is why there are stages
