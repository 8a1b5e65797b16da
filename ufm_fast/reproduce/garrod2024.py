"""Garrod and Keating on low rank in deep unconstrained features models; and what depth does further
(ours).
"""

from __future__ import annotations

from typing import Any

from ufm_fast import plots
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows
from ufm_fast.solvers.solution import Restart
from ufm_fast.solving import solve

PAPER = "Garrod and Keating 2024 (deep unconstrained features with cross-entropy)"
SIMPLEX, LOW_RANK, LAMBDA = 0.090662183213, 0.080012659245, 2.0**-10
STARTS = {
    "normal": ("normal", 1.0),
    "orthogonal": ("orthogonal", 1.0),
    "orthogonal x 2": ("orthogonal", 2.0),
}
#: Rows of depth-codes: classes, samples a class, layers, width, scale of the start, value,
#: dimension of the logits.
CODES: dict[str, tuple[int, int, int, int, float, float | None, int]] = {
    "K = 10, M = 1": (10, 5, 1, 12, 1.0, 0.139867258008, 9),
    "K = 10, M = 2": (10, 5, 2, 12, 1.0, 0.080012659245, 5),
    "K = 10, M = 3": (10, 5, 3, 12, 1.0, 0.058705223845, 4),
    "K = 10, M = 4": (10, 5, 4, 12, 1.0, None, 3),
    "K = 16, M = 3": (16, 1, 3, 20, 1.0, 0.058590437614, 5),
    "K = 27, M = 3": (27, 1, 3, 31, 1.0, 0.086536802594, 6),
    "K = 12, M = 5": (12, 1, 5, 16, 0.8, 0.035652705658, 3),
}
QUICK = ("K = 10, M = 1", "K = 10, M = 2", "K = 16, M = 3")


def _runs(
    K: int, n: int, M: int, width: int, start: str, scale: float, number: int
) -> tuple[Restart, ...]:
    problem = Problem(
        loss="ce", classes=K, per_class=n, dim=width, layers=M, lambda_w=LAMBDA, lambda_h=LAMBDA
    )
    options: dict[str, Any] = {"start": start, "start_scale": scale, "restarts": number}
    return solve(problem, metrics=False, certificate=False, **options).restarts


def _rank(quick: bool) -> Evidence:
    rows: Rows = []
    for width in (12, 70):
        for name, (start, scale) in STARTS.items():
            for run in _runs(10, 5, 2, width, start, scale, 4 if quick else 10):
                rows.append(
                    {
                        "width": width,
                        "start": name,
                        "seed": run.seed,
                        "value": run.value,
                        "rank": run.rank,
                    }
                )
    values = [row["value"] for row in rows]
    numbers = {
        "lowest value": min(values),
        "value nearest to the simplex's": min(values, key=lambda value: abs(value - SIMPLEX)),
    }
    drawn, axes = plots.panels(2)
    for ax, width in zip(axes, (12, 70), strict=True):
        for place, name in enumerate(STARTS):
            mine = [row for row in rows if (row["width"], row["start"]) == (width, name)]
            numbers[f"share of low rank, width {width}, {name}"] = sum(
                row["rank"] == 5 for row in mine
            ) / len(mine)
            ax.plot(
                [row["rank"] for row in mine],
                [row["value"] for row in mine],
                "os^"[place],
                alpha=0.6,
                label=name,
            )
        ax.axhline(SIMPLEX, color=plots.THEORY, linewidth=0.8, linestyle="--", label="simplex")
        ax.axhline(LOW_RANK, color=plots.THEORY, linewidth=0.8, linestyle=":", label="low rank")
        ax.set(xlabel="rank of the logits", ylabel="value", title=f"width {width}", xlim=(3.5, 9.5))
    return Evidence(numbers, rows, drawn)


def _codes(quick: bool) -> Evidence:
    rows: Rows = []
    numbers: dict[str, float] = {}
    for name in QUICK if quick else CODES:
        K, n, M, width, scale, value, _ = CODES[name]
        runs = _runs(K, n, M, width, "normal", scale, 8 if quick else 20)
        best = min(runs, key=lambda run: run.value)
        rows += [
            {"code": name, "seed": run.seed, "value": run.value, "rank": run.rank} for run in runs
        ]
        numbers[f"dimension of the best, {name}"] = float(best.rank or 0)
        numbers[f"lowest value, {name}"] = best.value
        if value is not None:
            numbers[f"value nearest to the code's, {name}"] = min(
                (run.value for run in runs), key=lambda v: abs(v - value)
            )
    drawn, (ax,) = plots.panels()
    for place, name in enumerate(dict.fromkeys(row["code"] for row in rows)):
        mine = [row for row in rows if row["code"] == name]
        ax.plot(
            [row["rank"] for row in mine],
            [row["value"] for row in mine],
            "o",
            label=name,
            color=plots.line_style(place)["color"],
        )
    ax.set(xlabel="dimension of the logits", ylabel="value")
    return Evidence(numbers, rows, drawn)


def _code_quantities() -> tuple[Quantity, ...]:
    found: list[Quantity] = []
    for name, (*_, value, dimension) in CODES.items():
        quick = name in QUICK
        found.append(
            Quantity(f"dimension of the best, {name}", float(dimension), 0.0, "at most", quick)
        )
        found.append(Quantity(f"lowest value, {name}", quick=quick))
        if value is not None:
            found.append(Quantity(f"value nearest to the code's, {name}", value, 1e-8, quick=quick))
    return tuple(found)


ROWS = (
    Claim(
        "garrod2024-rank",
        PAPER,
        "With two layers and cross-entropy collapse is not optimal: logits of half the rank lie "
        "lower.",
        "K = 10, n = 5, L = 2, lambda = 2^-10, d = 70, gradient descent .5, 10 runs",
        "lbfgs in balanced variables; widths 12 and 70; normal and semi-orthogonal starts, 10 each",
        (
            Quantity("lowest value", LOW_RANK, 1e-8),
            Quantity("value nearest to the simplex's", SIMPLEX, 1e-8),
            *(
                Quantity(f"share of low rank, width {width}, {name}")
                for width in (12, 70)
                for name in STARTS
            ),
        ),
        _rank,
        seconds=20,
        quick="4 starts each",
        quick_seconds=5,
    ),
    Claim(
        "depth-codes",
        "ours",
        "Depth chooses a code: the best logits found with more linear layers span ever fewer "
        "dimensions.",
        "none",
        "cross-entropy, lambda = 2^-10, 20 normal starts each; values of the simplex, the "
        "cross-polytope, the Petersen "
        "code, (5,16), (6,27), the icosahedron",
        _code_quantities(),
        _codes,
        seconds=60,
        quick="three of the seven, 8 starts",
        quick_seconds=5,
    ),
)
