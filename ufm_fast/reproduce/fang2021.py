"""Fang et al., Exploring deep neural networks via layer-peeled model: minority collapse, arXiv
2101.12699.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast import plots
from ufm_fast.curves import against_imbalance
from ufm_fast.functional import linear_cross_entropy
from ufm_fast.metrics import group_cosines
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, columns
from ufm_fast.theory import layer_peeled_collapse_ratio, layer_peeled_two_groups
from ufm_fast.theory.two_groups import layer_peeled_multiplier

PAPER = "Fang et al., PNAS 2021, arXiv 2101.12699"
CLASSES, ENERGY_H, ENERGY_W = 10, 5.0, 1.0
#: Number of majority classes -> the ratio from which on minority classes collapse.
RATIOS = {3: 245.4969, 5: 12.19245, 7: 4.00047}
POINTS = (1.0, 3.0, 10.0, 100.0, 1000.0)


def _direct(majority: int, ratio: float, price: float, seed: int) -> tuple[float, float]:
    """The penalised form sum_A CE + (1/R) sum_B CE + price/2 (|W|^2 + |H|^2), minimised by torch's
    L-BFGS from a random start: its value and the mean cosine of minority rows, nan where they are
    zero.
    """
    generator = torch.Generator().manual_seed(seed)
    W, H = (
        torch.randn(CLASSES, CLASSES, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(2)
    )
    labels = torch.arange(CLASSES)
    weight = torch.tensor(
        [1.0] * majority + [1 / ratio] * (CLASSES - majority), dtype=torch.float64
    )
    optimiser = torch.optim.LBFGS(
        [W, H],
        max_iter=3000,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_grad=1e-11,
        tolerance_change=1e-16,
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = linear_cross_entropy(H, W, labels, weight=weight, reduction="sum")
        value: Tensor = loss + 0.5 * price * (W.square().sum() + H.square().sum())
        torch.autograd.backward(value)
        return value

    optimiser.step(objective)  # type: ignore[no-untyped-call]
    cosine = group_cosines(W.detach(), (labels >= majority).long())[1, 1]
    return float(objective().detach()), float(cosine)


def _curve(quick: bool) -> Evidence:
    rows: Rows = []
    numbers: dict[str, float] = {}
    budget = CLASSES * math.sqrt(ENERGY_W * ENERGY_H)
    drawn, (ax,) = plots.panels()
    for place, majority in enumerate(RATIOS):
        groups = (majority, CLASSES - majority)
        numbers[f"ratio of collapse, k_A = {majority}"] = layer_peeled_collapse_ratio(
            groups, ENERGY_W, ENERGY_H
        )
        for ratio in POINTS[1:4:2] if quick else POINTS:
            theory = layer_peeled_two_groups(groups, ratio, ENERGY_W, ENERGY_H)
            price = layer_peeled_multiplier(groups, (1.0, 1 / ratio), budget)
            value, cosine = _direct(majority, ratio, price, seed=place)
            expected = theory.value + price * budget
            rows.append(
                {
                    "majority": majority,
                    "ratio": ratio,
                    "value": value,
                    "theory": expected,
                    "deviation": abs(value / expected - 1),
                    "cosine": cosine,
                    "theory_cosine": theory.cosine(1),
                }
            )
        ratios = [10 ** (i / 8) for i in range(25)]
        lines = [
            layer_peeled_two_groups(groups, ratio, ENERGY_W, ENERGY_H).cosine(1) for ratio in ratios
        ]
        found = columns([row for row in rows if row["majority"] == majority])
        theory_curve = {"ratio": ratios, "cosine": lines}
        against_imbalance(
            ax,
            found,
            {"cosine": f"$k_A$ = {majority}"},
            theory=theory_curve,
            colours=plots.COLOURS[place:],
        )
    numbers["largest deviation of a direct minimum"] = max(row["deviation"] for row in rows)
    ax.set(ylabel="cosine of minority classes")
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "fang2021-curve",
        PAPER,
        "Beyond a ratio of the class sizes the classifiers of minority classes become one.",
        "K = 10, E_H = 5, E_W = 1, weights 1 and 1/R, a convex program for R = 1 .. 1000, k_A = "
        "3, 5, 7",
        "the curve by the two-group form; points at R = 1, 3, 10, 100, 1000 by L-BFGS on the "
        "penalised form, d = 10",
        (
            *(
                Quantity(f"ratio of collapse, k_A = {majority}", ratio, 1e-5)
                for majority, ratio in RATIOS.items()
            ),
            Quantity("largest deviation of a direct minimum", 0.0, 1e-7, "absolute"),
        ),
        _curve,
        seconds=30,
        quick="two points a curve",
        quick_seconds=12,
    ),
)
