"""Thrampoulidis et al., Imbalance trouble: revisiting neural-collapse geometry, arXiv 2208.05512."""

from __future__ import annotations

import torch

from ufm_fast import plots
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, figure
from ufm_fast.solving import solve
from ufm_fast.theory import seli_spectrum, two_group_ce

PAPER = "Thrampoulidis et al., NeurIPS 2022, arXiv 2208.05512"
COUNTS, PENALTIES = [10, 10, 1, 1], (1e-3, 1e-5, 1e-7)


def _seli(quick: bool) -> Evidence:
    V, s, _ = seli_spectrum(COUNTS)
    limit = V @ torch.diag(s) @ V.T
    limit = limit / limit.norm()
    rows: Rows = []
    for lam in PENALTIES:
        solution = solve(Problem(loss="ce", counts=COUNTS, dim=8, lambda_w=lam, lambda_h=lam), start="normal", metrics=False)
        gram = solution.point.W @ solution.point.W.T
        theory = two_group_ce((2, 2), (10, 1), lam, lam)
        unit = torch.nn.functional.normalize(solution.point.W, dim=1)
        cosines = [float(unit[0] @ unit[1]), float(unit[2] @ unit[3])]
        deviation = max(abs(cosine - theory.cosine(group)) for group, cosine in enumerate(cosines))
        distance = float((gram / gram.norm() - limit).norm())
        rows.append(
            {"lambda": lam, "majority": cosines[0], "minority": cosines[1], "deviation": deviation, "distance": distance}
        )
    numbers = {"largest deviation of a cosine": max(row["deviation"] for row in rows)}
    numbers |= {f"distance to SELI, lambda = {row['lambda']:g}": row["distance"] for row in rows}
    drawn, (ax,) = figure()
    for number, name in enumerate(("majority", "minority", "distance")):
        label = name if name == "distance" else f"cosine, {name}"
        ax.plot([row["lambda"] for row in rows], [row[name] for row in rows], "o-", label=label, color=plots.COLOURS[number])
    ax.set(xscale="log", xlabel="lambda")
    ax.legend(frameon=False)
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "thrampoulidis2022-seli", PAPER,
        "As penalties vanish the geometry of unequal classes tends to that of the simplex-encoded labels.",
        "the limit lambda to 0; the rate (one over the logarithm) is ours",
        "counts 10, 10, 1, 1, d = 8, lambda 1e-3, 1e-5, 1e-7",
        (
            Quantity("largest deviation of a cosine", 0.0, 1e-6, "absolute"),
            *(Quantity(f"distance to SELI, lambda = {lam:g}") for lam in PENALTIES),
        ),
        _seli, seconds=2,
    ),
)  # fmt: skip
