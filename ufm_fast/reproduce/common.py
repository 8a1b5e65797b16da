"""What several papers' rows share: solutions with their trajectories and statistics of seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ufm_fast.measure import collapse_metrics
from ufm_fast.networks import LayerCollapse, Training, probe
from ufm_fast.networks.train import BLOCK
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.solution import Solution, StepRecord
from ufm_fast.solving import solve

Rows = list[dict[str, Any]]

Measure = Callable[[Problem, Point], Mapping[str, float]]
#: What a trajectory is drawn by, with its labels, where the minimum is a simplex or an orthogonal
#: frame.
TO_SIMPLEX = {
    "gap": "loss gap",
    "nc1_pinv": "NC1",
    "nc2_classifier": "NC2 W",
    "nc2_means": "NC2 means",
    "nc3": "NC3",
}
TO_FRAME = {
    "gap": "loss gap",
    "nc1_pinv": "NC1",
    "nc2_classifier_frame": "NC2 W",
    "nc2_means_frame": "NC2 means",
    "nc3_frame": "NC3",
}


def trajectory(
    problem: Problem, *, measure: Measure | None = None, **options: Any
) -> tuple[Solution, Rows]:
    """A solution over all samples in raw variables, and a row of metrics for each log point (by
    default NC1 to NC4).
    """
    rows: Rows = []

    def log(record: StepRecord, point: Callable[[], Point]) -> None:
        model = point()
        found = (
            collapse_metrics(problem, model, "none") if measure is None else measure(problem, model)
        )
        rows.append({"step": record.step, "value": record.value, **found})

    settings: dict[str, Any] = {
        "variables": "raw",
        "reduce": "none",
        "start": "normal",
        "max_steps": 200_000,
        **options,
    }
    return solve(problem, on_log=log, **settings), rows


def normal_point(problem: Problem, deviation: float, seed: int) -> Point:
    """Factors iid N(0, deviation^2) in the model's variables, H with a row for each sample."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (problem.num_classes, problem.head_dim),
        (problem.num_samples, problem.dim),
        *problem.trunk.shapes,
    ]
    W, H, *hidden = (
        deviation * torch.randn(*shape, dtype=torch.float64, generator=generator)
        for shape in shapes
    )
    return Point(W, H, None, tuple(hidden))


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def columns(rows: Rows) -> dict[str, list[float]]:
    """The numbers of rows as the columns that `ufm_fast.curves` draws."""
    return {
        name: [row[name] for row in rows]
        for name, value in rows[0].items()
        if isinstance(value, (int, float))
    }


def by_layer(training: Training, *, mismatch: bool = False) -> list[LayerCollapse]:
    """Collapse of each activation of a network on its training images, the deepest last."""
    data = training.data
    batches = [
        (data.train.images[block], data.train.labels[block])
        for block in torch.split(torch.arange(len(data.train)), BLOCK)
    ]
    return list(
        probe(
            training.network, training.network.hidden, batches, data.classes, mismatch=mismatch
        ).values()
    )


def steps_to_accuracy(training: Training, goal: float, every: int) -> int | None:
    """Steps until the training accuracy is ``goal``, looked at every so many; None if all steps do
    not suffice.
    """
    while training.evaluate("train")["accuracy"] < goal:
        if training.step >= training.options.steps:
            return None
        training.run(until=training.step + every)
    return training.step
