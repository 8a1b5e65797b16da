"""The overlay's picture: NC1 to NC3 by step, a panel a layer, and bars of what the model gets
wrong.

Networks are solid, with a band from least to most over their seeds; the model is dashed. The bars
are log(measured / predicted) for either matching: 0 is a right prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ufm_fast import plots
from ufm_fast.networks.overlay import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DRAWN = {"nc1_quotient": "NC1 quotient", "nc2_means_frame": "NC2 frame", "nc3_frame": "NC3"}
TITLES = ("h", "relu(W$_1$ h)")
#: What the bars show, with its label.
BARS = {
    "diagonal": "diagonal",
    "|W_2|^2 / |W_1|^2": "|W$_2$|²/|W$_1$|²",
    "|W_2|^2": "|W$_2$|²",
    "|W_1|^2": "|W$_1$|²",
    "data loss": "data loss",
}
MATCHINGS = {"balance": plots.COLOURS[4], "gap": plots.COLOURS[5]}


def overlay_figure(
    networks: Sequence[Sequence[Mapping[str, Any]]], model: plots.Records, table: Sequence[Row]
) -> Figure:
    """networks: the log of each; model: ``model_run``'s; table: ``compare``'s. Two columns wide."""
    figure, (*layers, bars) = plots.panels(3)
    for number, ax in enumerate(layers):
        for name in DRAWN:
            _curve(ax, f"layer{number}/{name}", plots.QUANTITY_COLOURS[name], networks, model)
        ax.set(xscale="log", yscale="log", xlabel="step", title=TITLES[number])
    layers[0].set_ylabel("distance from collapse")
    _bars(bars, table)
    return plots.finish(figure, _meanings(len(networks)))


def _meanings(networks: int) -> list[Any]:
    """What colours and dashes mean, and the band where there is one."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    of_networks = (
        f"{networks} networks, median and band of least to most" if networks > 1 else "network"
    )
    return [
        *(
            Line2D([], [], color=plots.QUANTITY_COLOURS[name], label=label)
            for name, label in DRAWN.items()
        ),
        Line2D([], [], color="0.3", label=of_networks),
        Line2D([], [], color="0.3", linestyle="--", label="model"),
        *(Patch(color=colour, label=f"by {matching}") for matching, colour in MATCHINGS.items()),
    ]


def _curve(
    ax: Axes,
    key: str,
    colour: str,
    networks: Sequence[Sequence[Mapping[str, Any]]],
    model: plots.Records,
) -> None:
    """Networks at the steps that all of them logged, the model as far as its numbers are no
    rounding.
    """
    steps = sorted(set.intersection(*({row["step"] for row in rows} for rows in networks)) - {0})
    values = np.array([[row[key] for row in rows if row["step"] in steps] for rows in networks])
    ax.plot(steps, np.median(values, 0), color=colour)
    if len(networks) > 1:
        ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
    shown = [(row["step"], row[key]) for row in model if row["step"] > 0 and row[key] > 1e-6]
    if shown:
        ax.plot(*zip(*shown, strict=True), color=colour, linestyle="--")


def _bars(ax: Axes, table: Sequence[Row]) -> None:
    rows, places = {row["quantity"]: row for row in table}, np.arange(len(BARS))
    for number, (matching, colour) in enumerate(MATCHINGS.items()):
        heights = [math.log(rows[name][f"ratio, {matching}"]) for name in BARS]
        ax.barh(places + 0.35 * number, heights, height=0.35, color=colour)
    ax.set_yticks(places + 0.17, list(BARS.values()))
    ax.axvline(0.0, color="0.5", linewidth=0.8)
    ax.set_xlabel("log(measured / predicted)")
