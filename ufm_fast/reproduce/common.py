"""What several papers' rows share: solutions with their trajectories, statistics of seeds, and figures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ufm_fast import plots
from ufm_fast.measure import collapse_metrics
from ufm_fast.networks import LayerCollapse, Training, probe
from ufm_fast.networks.train import BLOCK
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.solution import Solution, StepRecord
from ufm_fast.solving import solve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
#: Widths of one and two columns, in inches.
COLUMN, PAGE = 3.3, 6.8
#: What is smaller is not drawn: it is rounding, not a trend.
ROUNDING = 1e-12

Measure = Callable[[Problem, Point], Mapping[str, float]]


def trajectory(problem: Problem, *, measure: Measure | None = None, **options: Any) -> tuple[Solution, Rows]:
    """A solution over all samples in raw variables, and a row of metrics for each log point (by default NC1 to NC4)."""
    rows: Rows = []

    def log(record: StepRecord, point: Callable[[], Point]) -> None:
        model = point()
        found = collapse_metrics(problem, model, "none") if measure is None else measure(problem, model)
        rows.append({"step": record.step, "value": record.value, **found})

    settings: dict[str, Any] = {"variables": "raw", "reduce": "none", "start": "normal", "max_steps": 200_000, **options}
    return solve(problem, on_log=log, **settings), rows


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def columns(rows: Rows) -> dict[str, list[float]]:
    """The numbers of rows as the columns that `ufm_fast.curves` draws."""
    return {name: [row[name] for row in rows] for name, value in rows[0].items() if isinstance(value, (int, float))}


def figure(panels: int = 1, height: float = 2.4) -> tuple[Figure, list[Axes]]:
    """A row of panels, one column wide for one and two columns for more."""
    drawn = plots.new_figure(COLUMN if panels == 1 else PAGE, height)
    return drawn, list(drawn.subplots(1, panels, squeeze=False)[0])


def curves(ax: Axes, rows: Rows, names: Mapping[str, str], *, against: str = "step", legend: bool = True) -> Axes:
    """Columns of ``rows`` on a logarithmic axis, those of ``names`` with their labels."""
    for number, (name, label) in enumerate(names.items()):
        shown = [(row[against], row[name]) for row in rows if row.get(name) is not None and row[name] > ROUNDING]
        if shown:
            x, y = zip(*shown, strict=True)
            ax.plot(x, y, label=label, **quantity_style(name, number))
    ax.set_yscale("log")
    ax.set_xlabel(against)
    if legend:
        ax.legend(frameon=False)
    return ax


def quantity_style(name: str, number: int) -> dict[str, Any]:
    """The quantity's own colour, or the next of the palette."""
    style = plots.line_style(number)
    return {**style, "color": plots.QUANTITY_COLOURS.get(name, style["color"])}


def strips(ax: Axes, values: Mapping[str, Sequence[float]], *, label: str) -> Axes:
    """A column of dots, one a seed, for each name, with a line at the median."""
    for place, (name, numbers) in enumerate(values.items()):
        colour = plots.COLOURS[place % len(plots.COLOURS)]
        ax.plot([place] * len(numbers), numbers, "o", color=colour, label=name)
        ax.plot([place - 0.3, place + 0.3], [median(numbers)] * 2, color=colour, linewidth=1.5)
    ax.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    ax.set_xlim(-0.6, len(values) - 0.4)
    ax.set_ylabel(label)
    return ax


def by_layer(training: Training, *, mismatch: bool = False) -> list[LayerCollapse]:
    """Collapse of each activation of a network on its training images, the deepest last."""
    data = training.data
    batches = [
        (data.train.images[block], data.train.labels[block]) for block in torch.split(torch.arange(len(data.train)), BLOCK)
    ]
    return list(probe(training.network, training.network.hidden, batches, data.classes, mismatch=mismatch).values())


def steps_to_accuracy(training: Training, goal: float, every: int) -> int | None:
    """Steps until the training accuracy is ``goal``, looked at every so many; None if all steps do not suffice."""
    while training.evaluate("train")["accuracy"] < goal:
        if training.step >= training.options.steps:
            return None
        training.run(until=training.step + every)
    return training.step
