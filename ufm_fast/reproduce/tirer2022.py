"""Tirer and Bruna, Extended unconstrained features model for exploring deep neural collapse, arXiv
2202.08087.
"""

from __future__ import annotations

from ufm_fast import plots
from ufm_fast.metrics import ClassStatistics, RowMatrix, nc1_pinv, nc2, nc3_papyan
from ufm_fast.point import Point
from ufm_fast.presets import get_preset
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import TO_FRAME, TO_SIMPLEX, Rows, trajectory

PAPER = "Tirer and Bruna, ICML 2022, arXiv 2202.08087"
OURS = "K = 4, n = 50, d = 20, lambda_W = lambda_H = .005, float64, from W, H ~ N(0, 1/d)"
FRAME, SIMPLEX = 0.131421356237310, 0.098566017177982


def frame_metrics(problem: Problem, point: Point) -> dict[str, float]:
    """NC1, and the distances to an orthogonal frame, nothing centred."""
    W, means = (
        RowMatrix.of(point.W).raw,
        ClassStatistics(point.H, problem.rows("none").targets.indices, problem.num_classes),
    )
    return {
        "nc1_pinv": nc1_pinv(means),
        "nc2_classifier_frame": nc2(W, frame=True),
        "nc2_means_frame": nc2(means.raw_means, frame=True),
        "self_duality_uncentred": nc3_papyan(W, means.raw_means),
    }


def _frame(quick: bool) -> Evidence:
    problem = Problem(**get_preset("tirer2022").settings)
    drawn, axes = plots.panels(2)
    numbers: dict[str, float] = {}
    table: Rows = []
    for ax, method in zip(axes, ("gd", "momentum"), strict=True):
        solution, rows = trajectory(problem, method=method, measure=frame_metrics)
        end = frame_metrics(problem, solution.point)
        numbers |= {
            f"value, {method}": solution.value,
            **{f"{name}, {method}": end[name] for name in end},
        }
        table += [{"method": method, **row} for row in rows]
        for row in rows:
            row["gap"] = (row["value"] - FRAME) / FRAME
        plots.curves(ax, rows, {**TO_FRAME, "self_duality_uncentred": "NC3"}).set_title(method)
    return Evidence(numbers, table, drawn)


def _simplex(quick: bool) -> Evidence:
    problem = Problem(**get_preset("tirer2022-bias").settings)
    solution, rows = trajectory(problem, method="momentum")
    names = ("nc1_pinv", "nc2_classifier", "nc2_means", "nc3")
    numbers = {"value": solution.value, **{name: solution.metrics[name] for name in names}}
    for row in rows:
        row["gap"] = (row["value"] - SIMPLEX) / SIMPLEX
    drawn, (ax,) = plots.panels()
    plots.curves(ax, rows, TO_SIMPLEX)
    return Evidence(numbers, rows, drawn)


def zero(name: str, tolerance: float) -> Quantity:
    """A number that theory has at nought."""
    return Quantity(name, 0.0, tolerance, "absolute")


ROWS = (
    Claim(
        "tirer2022-frame",
        PAPER,
        "Without a bias every minimiser of the squared error is an orthogonal frame with W "
        "parallel to the class means.",
        "the objective; gradient descent",
        OURS + "; gd and momentum over all samples, raw variables",
        tuple(
            quantity
            for method in ("gd", "momentum")
            for quantity in (
                Quantity(f"value, {method}", FRAME, 1e-9),
                zero(f"nc1_pinv, {method}", 1e-12),
                zero(f"nc2_classifier_frame, {method}", 1e-8),
                zero(f"nc2_means_frame, {method}", 1e-8),
                zero(f"self_duality_uncentred, {method}", 1e-8),
            )
        ),
        _frame,
        seconds=3,
    ),
    Claim(
        "tirer2022-simplex",
        PAPER,
        "With a bias that is not penalised every minimiser is a simplex ETF.",
        "the objective; gradient descent",
        OURS + "; momentum over all samples, raw variables",
        (
            Quantity("value", SIMPLEX, 1e-9),
            zero("nc1_pinv", 1e-12),
            zero("nc2_classifier", 1e-8),
            zero("nc2_means", 1e-8),
            zero("nc3", 1e-8),
        ),
        _simplex,
        seconds=3,
    ),
)
