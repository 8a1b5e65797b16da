"""Certificate gaps of the focal loss with a bias by the convex envelope alone, and with rows that
follow the bias. No clock.

K of 2 to 12, counts balanced, drawn from 1..5 or log-spaced, gamma of 0.5 to 5, penalties of 0.1 to
1.3 times the largest class's collapse threshold, a free and a penalised bias, float64; the lowest
value of three starts. Then one larger problem: K = 300, counts log-spaced 1..20, gamma = 2, 0.8
times the threshold, free bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import numpy as np

from bench.table import Record
from ufm_fast import Problem, solve
from ufm_fast.objective import Objective
from ufm_fast.theory.certificates import focal
from ufm_fast.theory.certificates.focal_with_bias import following_bound

LEVELS = [0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0, 1.05, 1.15, 1.3]


def problem(make: np.random.Generator, bias: str) -> Problem:
    classes, kind = int(make.integers(2, 13)), int(make.integers(3))
    if kind == 0:
        counts = np.full(classes, make.integers(1, 20))
    elif kind == 1:
        counts = make.integers(1, 6, classes)
    else:
        counts = np.geomspace(1, make.integers(2, 200), classes).astype(int)
    gamma, level = float(make.choice([0.5, 1, 2, 3, 5])), float(make.choice(LEVELS))
    mu = level * float(counts.max()) ** 0.5 / float(counts.sum())
    lambda_b = float(10 ** make.uniform(-3, 0)) if bias == "penalised" else 0.0
    return Problem(
        counts=counts,
        dim=classes + 1,
        loss="focal",
        gamma=gamma,
        lambda_w=mu,
        lambda_h=mu,
        bias=bias,
        lambda_b=lambda_b,
    )


def gaps(case: Problem, starts: list[tuple[str, int]]) -> tuple[float, float]:
    """The relative gap that the envelope leaves at the lowest value found, and what is left of
    it.
    """
    with patch.multiple(focal, MOST_CLASSES=0, balanced_bound=lambda *_: -math.inf):
        found = [
            solve(replace(case, seed=seed), start=start, metrics=False) for start, seed in starts
        ]
    best = min(found, key=lambda solution: solution.value)
    assert best.certificate is not None
    known = best.certificate.lower_bound
    bound = following_bound(case, Objective(case).rows, best.point, best.value, known=known)
    return best.certificate.relative_gap, (best.value - bound) / best.value


def both(case: dict[str, object], found: tuple[float, float]) -> Iterator[Record]:
    for contender, gap in zip(("envelope", "following"), found, strict=True):
        yield Record(case, {"relative_gap": f"{gap:.1e}"}, contender)


def records(problems: int = 70) -> Iterator[Record]:
    make = np.random.default_rng(7)
    for bias in ("free", "penalised"):
        for index in range(problems):
            case = problem(make, bias)
            counts = " ".join(map(str, case.counts.tolist()))
            named = {"bias": bias, "problem": index, "counts": counts, "mu": f"{case.mu:.4g}"}
            yield from both(named, gaps(case, [("spectral", 0), ("normal", 1), ("normal", 2)]))
    counts = np.geomspace(1, 20, 300).astype(int)
    mu = 0.8 * float(counts.max()) ** 0.5 / float(counts.sum())
    large = Problem(
        counts=counts, dim=300, loss="focal", gamma=2.0, lambda_w=mu, lambda_h=mu, bias="free"
    )
    named = {"bias": "free", "problem": "K = 300", "counts": "geomspace(1, 20)", "mu": f"{mu:.4g}"}
    yield from both(named, gaps(large, [("spectral", 0)]))
