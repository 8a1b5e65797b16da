"""Hong and Ling, Neural collapse for the unconstrained feature model with imbalanced data, arXiv
2309.09725.
"""

from __future__ import annotations

import torch

from ufm_fast import plots
from ufm_fast.curves import against
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, columns
from ufm_fast.solving import solve
from ufm_fast.theory import two_group_ce

PAPER = "Hong and Ling, JMLR 2024, arXiv 2309.09725"
LEVELS = (0.0027, 0.0030, 0.0033, 0.0034, 0.0036, 0.0039)
GROUPS, COUNTS = (5, 5), (500, 100)
#: Spread of the minority's class means, relative to the majority's, below which they are one.
COLLAPSED = 1e-6


def _threshold(quick: bool) -> Evidence:
    rows: Rows = []
    for level in LEVELS:
        # Their lambda |.|^2 without the 1/2: lambda_W = 5 l, lambda_H = l/20, reg_b = .01.
        lambdas = (10 * level, level / 10, 0.02)
        problem = Problem(
            loss="ce",
            counts=[COUNTS[0]] * GROUPS[0] + [COUNTS[1]] * GROUPS[1],
            dim=10,
            bias="penalised",
            lambda_w=lambdas[0],
            lambda_h=lambdas[1],
            lambda_b=lambdas[2],
        )
        solution = solve(problem, start="normal", metrics=False)
        majority, minority = (
            means - means.mean(0) for means in torch.split(solution.point.H, list(GROUPS))
        )
        theory = two_group_ce(GROUPS, COUNTS, *lambdas)
        rows.append(
            {
                "level": level,
                "value": solution.value,
                "theory": theory.value,
                "deviation": abs(solution.value / theory.value - 1),
                "spread": float(minority.norm() / majority.norm()),
            }
        )
    apart = [row["level"] for row in rows if row["spread"] > COLLAPSED]
    together = [row["level"] for row in rows if row["spread"] <= COLLAPSED]
    numbers = {
        "largest level with the minority apart": max(apart),
        "least level with the minority collapsed": min(together),
        "largest deviation of a value": max(row["deviation"] for row in rows),
    }
    drawn, (ax,) = plots.panels()
    against(
        ax,
        columns(rows),
        "level",
        {"spread": "found"},
        threshold=1 / 300,
        label="penalty level l",
        scale="linear",
    )
    ax.set(yscale="log", ylabel="minority spread / majority's")
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "hong-ling2023-threshold",
        PAPER,
        "Minority classes collapse onto one point once the penalty passes a threshold.",
        "5 classes of 500, 5 of 100, lambda_W = 5 l, lambda_H = l/20, reg_b = .01, l .0027 to "
        ".0039; 1/300 is ours",
        "d = 10, from a normal start, l also at .0034 and .0036",
        (
            Quantity("largest level with the minority apart", 0.0033),
            Quantity("least level with the minority collapsed", 0.0034),
            Quantity("largest deviation of a value", 0.0, 1e-8, "absolute"),
        ),
        _threshold,
        seconds=5,
    ),
)
