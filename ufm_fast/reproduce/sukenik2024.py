"""Sukenik et al., Neural collapse versus low-rank bias: is deep neural collapse really optimal?,
NeurIPS 2024.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ufm_fast import plots
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows
from ufm_fast.solving import solve

PAPER = "Sukenik et al., NeurIPS 2024"
VERTICES, LAYERS, WIDTH, LAMBDA = 5, 4, 30, 0.004
#: The value of deep neural collapse: orthogonal frames in every layer.
FRAME = 0.0991798746


def _problem(seed: int = 0) -> Problem:
    K = math.comb(VERTICES, 2)
    sizes: dict[str, Any] = {"classes": K, "per_class": 1, "dim": WIDTH, "layers": LAYERS}
    return Problem(
        loss="mse", activation="relu", lambda_w=LAMBDA, lambda_h=LAMBDA, seed=seed, **sizes
    )


def strongly_regular_start() -> Point:
    """Classes as edges of a complete graph: every layer but the last has the r x K incidence matrix
    B, the last one B'B - J.

    B'B has 2 on the diagonal, 1 for edges that share a vertex, else 0, so max(B'B - J, 0) = I; and
    B'B - J = (B' - 1/2) B. Factors get equal norms, as at every critical point.
    """
    edges = list(combinations(range(VERTICES), 2))
    incidence = torch.zeros(VERTICES, len(edges), dtype=torch.float64)
    for column, edge in enumerate(edges):
        incidence[list(edge), column] = 1.0
    identity = torch.eye(VERTICES, dtype=torch.float64)
    factors = [
        _padded(torch.eye(len(edges), dtype=torch.float64), len(edges)),
        _padded(incidence.T, len(edges)),
        *[_padded(identity, WIDTH)] * (LAYERS - 2),
        _padded(incidence.T - 0.5, WIDTH),
    ]
    norm = math.prod(float(factor.norm()) for factor in factors) ** (1 / len(factors))
    W, H, *hidden = (factor * norm / factor.norm() for factor in factors)
    return Point(W, H, None, tuple(hidden))


def _padded(matrix: Tensor, rows: int) -> Tensor:
    found = torch.zeros(rows, WIDTH, dtype=torch.float64)
    found[: matrix.shape[0], : matrix.shape[1]] = matrix
    return found


def _graph(quick: bool) -> Evidence:
    graph = solve(_problem(), initial=strongly_regular_start(), metrics=False, certificate=False)
    runs = solve(
        _problem(), start="normal", restarts=2 if quick else 10, metrics=False, certificate=False
    ).restarts
    rows: Rows = [{"start": "graph", "value": graph.value, "ratio": graph.value / FRAME}]
    rows += [
        {
            "start": "normal",
            "seed": r.seed,
            "value": r.value,
            "ratio": r.value / FRAME,
            "rank": r.rank,
        }
        for r in runs
    ]
    numbers = {
        "value from the graph / frame": graph.value / FRAME,
        "value from a random start / frame, worst": max(run.value for run in runs) / FRAME,
        "value from a random start / frame, best": min(run.value for run in runs) / FRAME,
    }
    drawn, (ax,) = plots.panels()
    ax.plot(range(len(runs)), [run.value / FRAME for run in runs], "o", label="normal starts")
    ax.axhline(graph.value / FRAME, color=plots.COLOURS[1], label="from the graph")
    ax.axhline(1.0, color=plots.THEORY, linestyle="--", label="deep neural collapse")
    ax.set(xlabel="seed", ylabel="value / frame")
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "sukenik2024-srg",
        PAPER,
        "With four ReLU layers deep neural collapse is not optimal: features of strongly regular "
        "graphs lie lower.",
        "K = 10, L = 4, lambda = .004, width 30, gradient descent .5, 10 runs",
        "lbfgs with kinks rounded ever less, from the graph and from normal starts; n = 1",
        (
            Quantity("value from the graph / frame", 0.8831, 0.0, "at most"),
            Quantity("value from a random start / frame, worst", 0.93, 0.0, "at most"),
            Quantity("value from a random start / frame, best"),
        ),
        _graph,
        seconds=80,
        quick="2 random starts",
        quick_seconds=20,
    ),
)
