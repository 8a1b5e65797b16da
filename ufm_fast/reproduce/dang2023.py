"""Dang et al., Neural collapse in deep linear networks: from balanced to imbalanced data, arXiv
2301.00437.
"""

from __future__ import annotations

from ufm_fast import plots
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import TO_FRAME, Rows, normal_point, trajectory

PAPER = "Dang et al., ICML 2023, arXiv 2301.00437"
#: Number of layers -> the minimum.
MINIMA = {1: 0.0198, 3: 0.012629046991768, 6: 0.013507408249553}
DEVIATION, RATE = 0.1, 0.1


def _depth(quick: bool) -> Evidence:
    numbers: dict[str, float] = {}
    table: Rows = []
    depths = [1, 3] if quick else list(MINIMA)
    drawn, axes = plots.panels(len(depths))
    for ax, M in zip(axes, depths, strict=True):
        problem = Problem(
            loss="mse", classes=4, per_class=100, dim=64, layers=M, lambda_w=5e-4, lambda_h=5e-4
        )
        solution, rows = trajectory(
            problem,
            method="momentum",
            learning_rate=RATE,
            max_steps=10_000 if quick else 30_000,
            start="spectral",
            initial=normal_point(problem, DEVIATION, seed=2),
        )
        numbers[f"value, M = {M}"] = solution.value
        for row in rows:
            row["gap"] = (row["value"] - MINIMA[M]) / MINIMA[M]
        table += [{"layers": M, **row} for row in rows]
        plots.curves(ax, rows, TO_FRAME).set_title(f"M = {M}")
    return Evidence(numbers, table, drawn)


ROWS = (
    Claim(
        "dang2023-depth",
        PAPER,
        "Deep linear networks with squared error collapse to orthogonal frames, at the value of a "
        "formula.",
        "K = 4, n = 100, d = 64, all lambdas 5e-4, SGD .1/.9, 30,000 steps from N(0, .1^2), M = "
        "1, 3, 6",
        "none",
        tuple(
            Quantity(f"value, M = {M}", value, 1e-8, quick=M != 6, quick_tolerance=2e-3)
            for M, value in MINIMA.items()
        ),
        _depth,
        seconds=230,
        quick="M = 1 and 3, 10,000 steps",
        quick_seconds=40,
    ),
)
