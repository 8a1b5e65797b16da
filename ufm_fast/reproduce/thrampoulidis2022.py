"""Thrampoulidis et al., Imbalance trouble: revisiting neural-collapse geometry, arXiv
2208.05512.
"""

from __future__ import annotations

from ufm_fast import plots
from ufm_fast.curves import against_penalty
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, columns
from ufm_fast.solving import solve
from ufm_fast.theory import two_group_ce

PAPER = "Thrampoulidis et al., NeurIPS 2022, arXiv 2208.05512"
COUNTS, PENALTIES = [10, 10, 1, 1], (1e-3, 1e-5, 1e-7)


def _seli(quick: bool) -> Evidence:
    rows: Rows = []
    for lam in PENALTIES:
        solution = solve(
            Problem(loss="ce", counts=COUNTS, dim=8, lambda_w=lam, lambda_h=lam), start="normal"
        )
        found = solution.metrics
        theory = two_group_ce((2, 2), (10, 1), lam, lam)
        cosines = [found["cosine_majority"], found["cosine_minority"]]
        deviation = max(abs(cosine - theory.cosine(group)) for group, cosine in enumerate(cosines))
        rows.append(
            {
                "lambda": lam,
                "majority": cosines[0],
                "minority": cosines[1],
                "deviation": deviation,
                "distance": found["seli_classifier"],
            }
        )
    numbers = {"largest deviation of a cosine": max(row["deviation"] for row in rows)}
    numbers |= {f"distance to SELI, lambda = {row['lambda']:g}": row["distance"] for row in rows}
    drawn, (ax,) = plots.panels()
    shown = {
        "majority": "cosine, majority",
        "minority": "cosine, minority",
        "distance": "distance to SELI",
    }
    against_penalty(ax, columns(rows), shown)
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "thrampoulidis2022-seli",
        PAPER,
        "As penalties vanish the geometry of unequal classes tends to that of the simplex-encoded "
        "labels.",
        "the limit lambda to 0; the rate (one over the logarithm) is ours",
        "counts 10, 10, 1, 1, d = 8, lambda 1e-3, 1e-5, 1e-7",
        (
            Quantity("largest deviation of a cosine", 0.0, 1e-6, "absolute"),
            *(Quantity(f"distance to SELI, lambda = {lam:g}") for lam in PENALTIES),
        ),
        _seli,
        seconds=2,
    ),
)
