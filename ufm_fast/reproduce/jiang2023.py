"""Jiang et al., Generalized neural collapse for a large number of classes, arXiv 2310.05351."""

from __future__ import annotations

from typing import Any

import torch

from ufm_fast import plots
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows
from ufm_fast.solving import solve
from ufm_fast.theory.codes import Code, known_code

PAPER = "Jiang et al., ICML 2024, arXiv 2310.05351"
_SIZES = ((3, 12), (5, 16), (6, 27), (7, 56), (8, 240))
CODES: dict[tuple[int, int], Code] = {(d, K): code for d, K in _SIZES if (code := known_code(K, d))}
TEMPERATURE = 10.0
#: What the authors' notebook prints as the optimum of 100 classes in 10 dimensions.
PRINTED = 0.61416


def sphere(K: int, d: int, temperature: float) -> Problem:
    """Unit rows, one a class."""
    settings: dict[str, Any] = {
        "lambda_w": 0.0,
        "lambda_h": 0.0,
        "constraint": "sphere",
        "temperature": temperature,
    }
    return Problem(loss="ce", classes=K, per_class=1, dim=d, **settings)


def margin(point: Point) -> float:
    """min_k min_{j != k} <w_k - w_j, h_k>: at most the one-vs-rest distance of the code W, and
    equal at the best H.
    """
    logits = point.H @ point.W.T
    own = logits.diagonal().clone()
    logits.fill_diagonal_(-torch.inf)
    return float((own - logits.amax(1)).min())


def _codes(quick: bool) -> Evidence:
    rows: Rows = []
    numbers: dict[str, float] = {}
    drawn, (ax,) = plots.panels()
    for (d, K), code in CODES.items():
        if quick and K > 56:
            continue
        starts = 8 if K <= 56 else 4
        solution = solve(
            sphere(K, d, TEMPERATURE),
            start="normal",
            restarts=starts,
            metrics=False,
            certificate=False,
        )
        found = margin(solution.point)
        numbers |= {f"value, ({d}, {K})": solution.value, f"one-vs-rest, ({d}, {K})": found}
        rows += [
            {"d": d, "K": K, "seed": r.seed, "value": r.value, "evaluations": r.evaluations}
            for r in solution.restarts
        ]
        label, known = {True: ("found", "known code"), False: (None, None)}[
            min(size for _, size in CODES) == K
        ]
        ax.plot(K, found, "o", color=plots.COLOURS[0], label=label)
        ax.plot(K, 1 - max(code.cosines), "x", color=plots.THEORY, label=known)
    ax.set(xscale="log", xlabel="classes K", ylabel="one-vs-rest distance")
    return Evidence(numbers, rows, drawn)


def _hundred(quick: bool) -> Evidence:
    rows: Rows = []
    point: Point | None = None
    for temperature in (5, 10, 20, 40) if quick else (5, 10, 20, 40, 80, 160, 320):
        begin: dict[str, Any] = {"start": "normal"} if point is None else {"initial": point}
        solution = solve(
            sphere(100, 10, float(temperature)), metrics=False, certificate=False, **begin
        )
        point = solution.point
        rows.append(
            {
                "temperature": temperature,
                "value": solution.value,
                "margin": margin(point),
                "steps": solution.steps,
            }
        )
    drawn, (ax,) = plots.panels()
    ax.plot(
        [row["temperature"] for row in rows], [row["margin"] for row in rows], "o-", label="found"
    )
    ax.axhline(PRINTED, color=plots.THEORY, linestyle="--", label="printed as optimal")
    ax.set(xscale="log", xlabel="temperature t", ylabel="one-vs-rest margin")
    return Evidence({"one-vs-rest margin": rows[-1]["margin"]}, rows, drawn)


def _quantities() -> tuple[Quantity, ...]:
    found: list[Quantity] = []
    for (d, K), code in CODES.items():
        quick = K <= 56
        found.append(Quantity(f"value, ({d}, {K})", code.value(TEMPERATURE), 1e-9, quick=quick))
        found.append(Quantity(f"one-vs-rest, ({d}, {K})", 1 - max(code.cosines), 1e-8, quick=quick))
    return tuple(found)


ROWS = (
    Claim(
        "jiang2023-codes",
        PAPER,
        "More classes than dimensions settle on codes: on spheres the minima are the known sharp "
        "ones.",
        "hardmax and softmax codes of the same sizes, 1e5 subgradient steps",
        "cross-entropy at t = 10, 8 normal starts (E8: 4)",
        _quantities(),
        _codes,
        seconds=20,
        quick="without (8, 240)",
        quick_seconds=8,
    ),
    Claim(
        "jiang2023-100in10",
        PAPER,
        "A hundred classes in ten dimensions can be further apart than what was printed as "
        "optimal.",
        "one-vs-rest .61416, by subgradient steps on the worst pair",
        "cross-entropy at t = 5, 10, .. 320, each from the last point",
        (Quantity("one-vs-rest margin", 0.63, 0.0, "at least"),),
        _hundred,
        seconds=60,
        quick="t up to 40",
        quick_seconds=12,
    ),
)
