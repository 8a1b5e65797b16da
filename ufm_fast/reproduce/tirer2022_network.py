"""Tirer and Bruna's last experiment: the extended model beside a network, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ufm_fast import plots
from ufm_fast.networks import Architecture, Options, Training, load
from ufm_fast.networks.overlay import Tail, balanced_penalty, compare, penalty_at_gap, tail_of
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, figure, median, trajectory
from ufm_fast.solvers.minimise import log_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = "Tirer and Bruna, ICML 2022, arXiv 2202.08087"
DECAY, WIDTH = 2e-3, 128
DRAWN = {"nc1_quotient": ("NC1 quotient", 0), "nc2_means_frame": ("NC2 frame", 1), "nc3": ("NC3", 3)}
BARS = ("diagonal", "|W_2|^2 / |W_1|^2", "|W_2|^2", "|W_1|^2", "data loss")


def _trained(steps: int, seed: int) -> tuple[Training, Rows]:
    options = Options(
        architecture=Architecture(widths=(WIDTH, WIDTH), unbiased=2), loss="mse", weight_decay=DECAY, steps=steps, seed=seed
    )  # fmt: skip
    training, rows, spaced = Training(load("digits"), options), [], log_spaced(per_decade=10)
    while training.step < steps:
        training.run(until=min(max(next(spaced), training.step), steps))
        rows.append({"seed": seed, "step": training.step, **tail_of(training).collapse()})
    return training, rows


def _model(tail: Tail, steps: int) -> Rows:
    """The extended model of all samples, by momentum from a normal start, lambda_H by balance.

    In balanced variables: in raw ones lambda_H = 6e-6 and the share 1/N of a sample let features move a thousand times slower.
    """
    problem = Problem(
        loss="mse", labels=tail.labels, dim=tail.W1.shape[1], layers=2, activation="relu", widths=tail.W1.shape[0],
        lambda_w=DECAY, lambda_hidden=DECAY, lambda_h=balanced_penalty(tail, DECAY),
    )  # fmt: skip

    def look(_: Problem, x: Point) -> dict[str, float]:
        return Tail(x.W, x.hidden[0], x.H, tail.labels, tail.counts).collapse()

    options: dict[str, Any] = {
        "method": "momentum",
        "variables": "balanced",
        "max_steps": steps,
        "metrics": False,
        "certificate": False,
    }
    return trajectory(problem, measure=look, **options)[1]


def _network(quick: bool) -> Evidence:
    seeds, steps = (1, 2500) if quick else (3, 6000)
    runs = [_trained(steps, seed) for seed in range(seeds)]
    tails = [tail_of(training) for training, _ in runs]
    tables = [list(compare(tail, DECAY)) for tail in tails]

    def middle(read: Callable[[Tail], float]) -> float:
        return median([read(tail) for tail in tails])

    numbers = {
        "largest off-diagonal / diagonal": middle(lambda t: t.numbers()["largest off-diagonal"] / t.numbers()["diagonal"]),
        "|W_2|^2 / |W_1|^2": middle(lambda t: t.numbers()["|W_2|^2 / |W_1|^2"]),
        "NC1 quotient, layer 2 / layer 1": middle(
            lambda t: t.collapse()["nc1_quotient, layer 2"] / t.collapse()["nc1_quotient, layer 1"]
        ),
        "lambda_H by balance": middle(lambda t: balanced_penalty(t, DECAY)),
        "lambda_H by gap": middle(lambda t: penalty_at_gap(t, DECAY)),
    }
    ratios: dict[str, dict[str, float]] = {}
    for matching in ("balance", "gap"):
        ratios[matching] = {
            str(rows[0]["quantity"]): median([float(row[f"ratio, {matching}"]) for row in rows])
            for rows in zip(*tables, strict=True)
            if rows[0]["quantity"] in BARS
        }
        numbers |= {f"measured / predicted by {matching}, {name}": value for name, value in ratios[matching].items()}
    drawn, axes = figure(3)
    model = _model(tails[0], 200 if quick else 1000)
    for layer, ax in enumerate(axes[:2], 1):
        _panel(ax, layer, [rows for _, rows in runs], model)
    axes[1].legend(frameon=False, loc="lower left")  # where nothing is drawn
    _bars(axes[2], ratios)
    table = [{"seed": seed, **row} for seed, rows in enumerate(tables) for row in rows]
    return Evidence(numbers, table + [row for _, rows in runs for row in rows], drawn)


def _panel(ax: Axes, layer: int, networks: list[Rows], model: Rows) -> None:
    """Network solid, a band over its seeds; model dashed."""
    for name, (label, place) in DRAWN.items():
        key, colour = f"{name}, layer {layer}", plots.COLOURS[place]
        steps = [row["step"] for row in networks[0]]
        values = np.array([[row[key] for row in rows] for rows in networks])
        ax.plot(steps, np.median(values, 0), color=colour, label=label)
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        shown = [(row["step"], row[key]) for row in model if row["step"] > 0 and row[key] > 1e-6]
        if shown:
            ax.plot(*zip(*shown, strict=True), color=colour, linestyle="--")
    ax.set(xscale="log", yscale="log", xlabel="step", title=("h", "relu(W$_1$ h)")[layer - 1])


def _bars(ax: Axes, ratios: dict[str, dict[str, float]]) -> None:
    places = torch.arange(len(BARS)).numpy()
    for number, (matching, of) in enumerate(ratios.items()):
        heights = [math.log(of[name]) for name in BARS]
        ax.barh(places + 0.35 * number, heights, height=0.35, color=plots.COLOURS[4 + number], label=f"by {matching}")
    names = ("diagonal", "|W$_2$|²/|W$_1$|²", "|W$_2$|²", "|W$_1$|²", "data loss")
    ax.set_yticks(places + 0.17, names)
    ax.axvline(0.0, color="0.5", linewidth=0.8)
    ax.set_xlabel("log(measured / predicted)")
    ax.legend(frameon=False)


ROWS = (
    Claim(
        "tirer2022-network", PAPER,
        "The extended model predicts the geometry of a network's last two layers; the size of its loss it does not.",
        "ResNet18 with two more layers on MNIST, SGD",
        "digits, MLP 128-128, last two layers without bias, mse, lambda 2e-3, 6,000 steps, medians over 3 seeds",
        (
            Quantity("largest off-diagonal / diagonal", 0.0, 0.05, "absolute", quick_tolerance=0.1),
            Quantity("|W_2|^2 / |W_1|^2", 1.0, 0.05, quick_tolerance=0.5),
            Quantity("NC1 quotient, layer 2 / layer 1", 1.0, 0.0, "at most"),
            Quantity("lambda_H by balance"), Quantity("lambda_H by gap"),
            *(Quantity(f"measured / predicted by {m}, {name}") for m in ("balance", "gap") for name in BARS),
        ),
        _network, seconds=90, quick="2,500 steps, one seed", quick_seconds=20,
    ),
)  # fmt: skip
