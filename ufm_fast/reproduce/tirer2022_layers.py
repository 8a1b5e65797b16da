"""Two layers under the squared error: Tirer and Bruna, Extended unconstrained features model for
exploring deep neural collapse, arXiv 2202.08087.

Momentum .1/.9 with two ReLU layers comes within 1e-6 of the minimum in 30,000 steps from some
starts only: of the row's five, N(0, .1^2), the last ended 1.3e-10 above it in relative terms, the
others 2.6e-5 to 1.7e-4 (AMD EPYC (Zen 3), torch 2.13.0, 2026-11-30; the seeds' curves stand in the
row's CSV). Where it is slow, NC1 is rounding already, but the means of H are no frame yet, and the
gap falls as a power of the step. So the row asks for the best of five starts, and reports how many
came so near.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ufm_fast import plots
from ufm_fast.presets import get_preset
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import TO_FRAME, Rows, normal_point, trajectory
from ufm_fast.reproduce.tirer2022 import OURS, PAPER, zero
from ufm_fast.solvers.solution import Solution
from ufm_fast.solving import solve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Minima with one more layer at lambda = .005, and at 5e-4: theory.layered_mse.
MINIMUM, WEAK = 0.107735715648647, 0.011024883268065
#: Of the starts of momentum, which are normal with this deviation, and how near one has to come.
SEEDS, DEVIATION, NEAR = range(5), 0.1, 1e-6


def _layers(activation: str, start: str, quick: bool) -> tuple[dict[str, float], Rows, Solution]:
    """Two layers from ten seeds: the worst value, the best point's geometry by layer, and whether
    its energies agree.
    """
    problem = Problem(**get_preset("tirer2022").settings, layers=2, activation=activation)
    solution = solve(problem, start=start, restarts=3 if quick else 10)
    metrics, energies = (
        solution.metrics,
        [v for name, v in solution.metrics.items() if name.startswith("energy/")],
    )
    numbers = {
        "value, worst seed": max(run.value for run in solution.restarts),
        "nc2_means_frame, H": metrics["layer0/nc2_means_frame"],
        "nc2_means_frame, behind the layer": metrics["layer1/nc2_means_frame"],
        "nc2_classifier_frame": metrics["nc2_classifier_frame"],
        "layer energies, largest / least - 1": max(energies) / min(energies) - 1,
    }
    return (
        numbers,
        [
            {"seed": run.seed, "value": run.value, "evaluations": run.evaluations}
            for run in solution.restarts
        ],
        solution,
    )


def _linear2(quick: bool) -> Evidence:
    numbers, rows, solution = _layers("linear", "orthogonal", quick)
    drawn, axes = plots.panels(2)
    axes[0].plot(
        [row["seed"] for row in rows], [row["evaluations"] for row in rows], "o", color=plots.VALUE
    )
    axes[0].set(xlabel="seed", ylabel="evaluations")
    _spectra(axes[1], solution)
    return Evidence(numbers, rows, drawn)


def _relu2(quick: bool) -> Evidence:
    numbers, rows, solution = _layers("relu", "normal", quick)
    drawn, axes = plots.panels(2)
    _spectra(axes[1], solution)
    weak = {**get_preset("tirer2022").settings, "lambda_w": 5e-4, "lambda_h": 5e-4}
    problem = Problem(**weak, layers=2, activation="relu")
    numbers["value, lbfgs at lambda 5e-4"] = solve(
        problem, start="normal", restarts=2, metrics=False
    ).value
    seeds, steps = (SEEDS[:1], 2000) if quick else (SEEDS, 30_000)
    logs = [_descent(problem, seed, steps) for seed in seeds]
    best = min(logs, key=lambda log: log[-1]["gap"])
    if not quick:
        near = [log[-1]["gap"] <= NEAR for log in logs]
        numbers["value, momentum at lambda 5e-4, best seed"] = best[-1]["value"]
        numbers["share of seeds within 1e-6"] = sum(near) / len(near)
    plots.curves(axes[0], best, TO_FRAME)
    return Evidence(numbers, rows + [row for log in logs for row in log], drawn)


def _descent(problem: Problem, seed: int, steps: int) -> Rows:
    """Log points of momentum over all samples, the last step among them, with the gap to the
    minimum in relative terms.
    """
    _, log = trajectory(
        problem,
        method="momentum",
        learning_rate=0.1,
        max_steps=steps,
        start="spectral",
        initial=normal_point(problem, DEVIATION, seed),
    )
    return [
        {"seed": seed, "momentum": True, "gap": (row["value"] - WEAK) / WEAK, **row} for row in log
    ]


def _spectra(ax: Axes, solution: Solution) -> None:
    """Singular values of every factor."""
    for number, (name, factor) in enumerate(solution.point.named().items()):
        values = torch.linalg.svdvals(factor)[:8]
        style = {**plots.quantity_style(name, number), "marker": "o", "markersize": 7 - 2 * number}
        ax.plot(range(1, len(values) + 1), values.numpy(), label=name, **style)
    ax.set(xlabel="index", ylabel="singular value")


def _claim(
    name: str,
    start: str,
    measure: Callable[[bool], Evidence],
    *,
    seconds: float,
    quick: str,
    quick_seconds: float,
    more: str = "",
    extra: tuple[Quantity, ...] = (),
) -> Claim:
    return Claim(
        f"tirer2022-{name}2",
        PAPER,
        f"With one more {name} layer minimisers are frames in every layer, alike in energy.",
        "the objective; gradient descent",
        f"{OURS.split(', float64')[0]}, M = 2, width 20, {start} starts in balanced variables, 10 "
        f"seeds{more}",
        (
            Quantity("value, worst seed", MINIMUM, 1e-8),
            zero("nc2_means_frame, H", 1e-8),
            zero("nc2_means_frame, behind the layer", 1e-8),
            zero("nc2_classifier_frame", 1e-8),
            zero("layer energies, largest / least - 1", 1e-8),
            *extra,
        ),
        measure,
        seconds=seconds,
        quick=quick,
        quick_seconds=quick_seconds,
    )


ROWS = (
    _claim("linear", "orthogonal", _linear2, seconds=3, quick="3 seeds", quick_seconds=1),
    _claim(
        "relu",
        "normal",
        _relu2,
        seconds=180,
        quick="3 seeds, 2,000 momentum steps from one start",
        quick_seconds=6,
        more="; momentum .1/.9 at lambda 5e-4, 30,000 steps over all samples, best of 5 starts "
        "N(0, .1^2)",
        extra=(
            Quantity("value, lbfgs at lambda 5e-4", WEAK, 1e-8),
            Quantity("value, momentum at lambda 5e-4, best seed", WEAK, NEAR, quick=False),
            Quantity("share of seeds within 1e-6", quick=False),
        ),
    ),
)
