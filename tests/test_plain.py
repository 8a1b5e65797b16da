"""Plain problems keep their minima whatever moves into the house beside them: values of a dozen
solves, to 1e-12.
"""

from __future__ import annotations

import pytest

from bench.same_bits import CASES
from ufm_fast import Problem, solve

#: Of commit f597f86. Left out: bfloat16, and d < K - 1, where rounding chooses among local minima.
VALUES = {
    "ce balanced": 0.026450295437804326,
    "ce counts, random start": 0.04035564194053237,
    "ce free bias": 0.015741105012984518,
    "ce penalised bias": 0.01660710910067419,
    "smoothing": 0.354438315786325,
    "focal": 0.008869612727014213,
    "pick-all": 0.4282352107010178,
    "mse": 0.002646926232242185,
    "mse free bias": 0.0019044754950664545,
    "gd raw, all samples": 0.003906559114603889,
    "momentum": 0.014439197309567468,
    "newton-cg, frozen w": 0.029999698004509738,
    "alternating": 0.002646926232242186,
}


@pytest.mark.parametrize("name", VALUES)
def test_the_value_is_that_of_before(name):
    problem, options = CASES[name]
    assert solve(Problem(**problem, seed=1), **options, metrics=False).value == pytest.approx(
        VALUES[name], rel=1e-12
    )
