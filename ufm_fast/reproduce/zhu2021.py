"""Zhu et al., A geometric analysis of neural collapse with unconstrained features, arXiv
2105.02375.
"""

from __future__ import annotations

from ufm_fast import plots
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows
from ufm_fast.solving import solve
from ufm_fast.theory import ce_minimum

PAPER = "Zhu et al., NeurIPS 2021, arXiv 2105.02375"
CLASSES, STRENGTH = (10, 100, 1000), 0.05
MEASURES = {
    "nc2_classifier": "NC2 W",
    "nc2_means": "NC2 means",
    "nc3": "NC3",
    "relative_gap": "certificate",
}


def _simplex(quick: bool) -> Evidence:
    numbers: dict[str, float] = {}
    rows: Rows = []
    for K in CLASSES[:2] if quick else CLASSES:
        lam = STRENGTH / K
        problem = Problem(
            loss="ce",
            classes=K,
            dim=K,
            per_class=1,
            bias="penalised",
            lambda_w=lam,
            lambda_h=lam,
            lambda_b=lam,
        )
        solution = solve(problem, start="normal", pairwise="none")
        gap = 1.0 if solution.certificate is None else solution.certificate.relative_gap
        row = {"value": solution.value, "nc2_classifier": solution.metrics["nc2_classifier"]}
        row |= {
            "nc2_means": solution.metrics["nc2_means"],
            "nc3": solution.metrics["nc3"],
            "relative_gap": gap,
        }
        numbers |= {f"{name}, K = {K}": value for name, value in row.items()}
        rows.append({"classes": K, **row, "steps": solution.steps, "seconds": solution.seconds})
    drawn, (ax,) = plots.panels()
    plots.curves(ax, rows, MEASURES, against="classes")
    ax.set(xscale="log", xlabel="classes K")
    ax.set_xticks(
        [row["classes"] for row in rows], [str(row["classes"]) for row in rows], minor=False
    )
    return Evidence(numbers, rows, drawn)


def _quantities(K: int) -> tuple[Quantity, ...]:
    quick = K in CLASSES[:-1]
    zeros = tuple(
        Quantity(f"{name}, K = {K}", 0.0, 1e-7, "absolute", quick)
        for name in (*list(MEASURES)[:3], "relative_gap")
    )
    return (
        Quantity(
            f"value, K = {K}", ce_minimum(K, 1, STRENGTH / K, STRENGTH / K), 1e-9, quick=quick
        ),
        *zeros,
    )


ROWS = (
    Claim(
        "zhu2021-simplex",
        PAPER,
        "Cross-entropy with weight decay on W, H and b has no minimisers but simplex ETFs, found "
        "from any start.",
        "penalties (wd/2)|.|^2; networks on images",
        "K = d = 10, 100, 1000, n = 1, lambda = .05/K on W, H and b, random starts",
        tuple(quantity for K in CLASSES for quantity in _quantities(K)),
        _simplex,
        seconds=20,
        quick="K = 10 and 100",
        quick_seconds=1,
    ),
)
