"""Yaras et al., Neural collapse with normalised features, arXiv 2209.09211."""

from __future__ import annotations

import math
from typing import Any

import torch

from ufm_fast import plots
from ufm_fast.landscape import smallest_curvature
from ufm_fast.networks import Architecture, Options, Training, load
from ufm_fast.objective import Objective
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, median, steps_to_accuracy
from ufm_fast.reproduce.jiang2023 import sphere
from ufm_fast.solving import solve

PAPER = "Yaras et al., NeurIPS 2022, arXiv 2209.09211"
TEMPERATURE, GOAL, EVERY, MOST = 10.0, 0.99, 10, 2000
#: Temperature -> log(1 + 9 exp(-10 t/9)).
FLOORS = {
    t: math.log1p(9 * math.exp(-10 * t / 9))
    for t in (0.001, 0.01, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 100.0)
}
SADDLES = (4, 6, 50)
HEADS = {"plain": None, f"unit features, t = {TEMPERATURE:g}": TEMPERATURE}


def _spheres(quick: bool) -> Evidence:
    rows: Rows = []
    point = None
    for temperature, theory in FLOORS.items():
        # Above t = 15 random starts meet plateaus, so those go on from the temperature before.
        begin: dict[str, Any] = {"start": "normal"} if temperature <= 10 else {"initial": point}
        solution = solve(sphere(10, 16, temperature), **begin)
        point = solution.point
        rows.append(
            {
                "temperature": temperature,
                "value": solution.value,
                "theory": theory,
                "nc2_classifier": solution.metrics["nc2_classifier"],
                "evaluations": solution.evaluations,
            }
        )
    numbers = {f"value, t = {row['temperature']:g}": row["value"] for row in rows}
    drawn, (ax,) = plots.panels()
    ax.plot(
        [row["temperature"] for row in rows], [row["value"] for row in rows], "o", label="found"
    )
    ax.plot(list(FLOORS), list(FLOORS.values()), color=plots.THEORY, linewidth=1.0, label="theory")
    ax.set(xscale="log", yscale="log", xlabel="temperature t", ylabel="value")
    return Evidence(numbers, rows, drawn)


def _saddle(quick: bool) -> Evidence:
    rows: Rows = []
    for K in SADDLES:
        problem = sphere(K, 8, TEMPERATURE)
        w, h = torch.nn.functional.normalize(
            torch.tensor([[1.0] * 8, [-1.0] + [1.0] * 7], dtype=torch.float64), dim=1
        )
        objective = Objective(problem)
        x = objective.from_model(w.expand(K, 8).clone(), h.expand(K, 8).clone(), None)
        found = smallest_curvature(objective, x)
        rows.append(
            {
                "classes": K,
                "eigenvalue": found.eigenvalue,
                "theory": -TEMPERATURE / K,
                "products": found.products,
            }
        )
    numbers = {f"smallest eigenvalue, K = {row['classes']}": row["eigenvalue"] for row in rows}
    drawn, (ax,) = plots.panels()
    ax.plot(
        [row["classes"] for row in rows], [-row["eigenvalue"] for row in rows], "o", label="found"
    )
    ax.plot(
        SADDLES, [TEMPERATURE / K for K in SADDLES], color=plots.THEORY, linewidth=1.0, label="t/K"
    )
    ax.set(xscale="log", yscale="log", xlabel="classes K", ylabel="- smallest eigenvalue")
    return Evidence(numbers, rows, drawn)


def _network(quick: bool) -> Evidence:
    data = load("digits")
    rows: Rows = []
    for seed in range(1 if quick else 3):
        for name, temperature in HEADS.items():
            architecture = Architecture(widths=(128, 128), unbiased=1, normalised=temperature)
            options = Options(architecture=architecture, schedule="constant", steps=MOST, seed=seed)
            steps = steps_to_accuracy(Training(data, options), GOAL, EVERY)
            rows.append(
                {
                    "head": name,
                    "seed": seed,
                    "steps": MOST if steps is None else steps,
                    "reached": steps is not None,
                }
            )
    steps_of = {name: [row["steps"] for row in rows if row["head"] == name] for name in HEADS}
    plain, unit = (median(steps_of[name]) for name in HEADS)
    drawn, (ax,) = plots.panels()
    plots.strips(ax, steps_of, label="steps to 99 %")
    numbers = {"steps, unit / plain": unit / plain, "steps, plain": plain, "steps, unit": unit}
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "yaras2022-spheres",
        PAPER,
        "With unit features and classifier rows the only minima are simplex ETFs, at any "
        "temperature.",
        "temperatures .001 to 100 of networks",
        "K = 10, d = 16, n = 1; normal starts up to t = 10, then t = 30 and 100 in turn",
        tuple(Quantity(f"value, t = {t:g}", value, 1e-9) for t, value in FLOORS.items()),
        _spheres,
        seconds=3,
    ),
    Claim(
        "yaras2022-saddle",
        PAPER,
        "Where all rows of W, and all of H, are one, there is a direction downwards.",
        "strict saddles, no eigenvalue given",
        "t = 10, d = 8, K = 4, 6, 50; the eigenvalue -t/K is ours",
        tuple(Quantity(f"smallest eigenvalue, K = {K}", -TEMPERATURE / K, 1e-8) for K in SADDLES),
        _saddle,
        seconds=2,
    ),
    Claim(
        "yaras2022-network",
        PAPER,
        "With unit features and classifier rows a network fits its training set in fewer steps.",
        "ResNets on CIFAR, t = 1, logits t <w, h>, rows renormalised after each step",
        "digits, MLP 128-128 without a last bias, ce, t = 10, SGD .05/.9, normalised in the "
        "forward pass, medians over 3 seeds",
        (
            Quantity("steps, unit / plain", 1.0, 0.0, "at most"),
            Quantity("steps, plain"),
            Quantity("steps, unit"),
        ),
        _network,
        seconds=60,
        quick="one seed",
        quick_seconds=3,
    ),
)
