"""Gradient evaluations of pick-all problems with random target sets, with and without the model of
`curvature.sets`. No clock.

K = 32 classes, d = 32, 12 sets of one to three classes with 1 to 49 samples, lambda_W = lambda_H =
4e-6, lambda_b = 30, float64, the spectral start, L-BFGS with its Newton-CG finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np

from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.solvers.curvature import sets
from ufm_fast.targets import TargetSets


def problem(seed: int, classes: int = 32, rows: int = 12) -> Problem:
    make = np.random.default_rng(seed)
    sets = [
        np.sort(make.choice(classes, size=int(make.integers(1, 4)), replace=False))
        for _ in range(rows)
    ]
    data = TargetSets.create(
        np.cumsum([0, *map(len, sets)]), np.concatenate(sets), classes, make.integers(1, 50, rows)
    )
    return Problem(
        target_sets=data,
        loss="pick-all",
        dim=classes,
        bias="penalised",
        lambda_b=30.0,
        lambda_w=4e-6,
        lambda_h=4e-6,
    )


def records(problems: int = 10) -> Iterator[Record]:
    for seed in range(problems):
        for most in (0, sets.MOST_ENTRIES):
            with patch.object(sets, "MOST_ENTRIES", most):
                found = solve(problem(seed), metrics=False)
            assert found.certificate is not None
            yield Record(
                {"seed": seed},
                {
                    "steps": found.steps,
                    "evaluations": found.evaluations,
                    "ended": found.outcome.value,
                    "gap": f"{found.certificate.relative_gap:.1e}",
                },
                "targets" if most else "identity",
            )
