"""Curves of logs: gaps, gradients and metrics by step or second, bands over seeds, dots over
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ufm_fast.plots.palette import COLOURS, VALUE, line_style, quantity_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Records = Sequence[Mapping[str, Any]]

_LABELS = {
    "nc1_pinv": "NC1  tr(Σ$_W$Σ$_B^+$)/K",
    "nc2_classifier": "NC2  classifier",
    "nc2_means": "NC2  class means",
    "nc3": "NC3  self-duality",
    "nc2_classifier_frame": "NC2  classifier, orthogonal frame",
    "nc2_means_frame": "NC2  class means, orthogonal frame",
    "nc3_frame": "NC3  self-duality, orthogonal frame",
    "nrc1": "NRC1  features beside their components",
    "nrc2": "NRC2  features beside the rows of W",
    "nrc3": "NRC3  W against the targets' covariance",
    "nc4": "NC4  share predicted unlike the nearest mean",
}
_LARGEST = 1e100  # a diverged run would stretch an axis beyond what it can label
#: Up to so many points are marked.
FEW = 30
#: Distances from collapse that are smaller are zero but for rounding: drawn they would look like a
#: trend.
ROUNDING = 1e-12


def loss_gap(
    ax: Axes, records: Records, reference: float, *, against: str = "step", label: str | None = None
) -> Axes:
    """(f - reference)/reference against ``step`` or ``seconds``; points at or below rounding are
    left out.

    ``reference``: the theory value, the certificate's lower bound, or the best value seen.
    """
    scale = abs(reference) or 1.0
    values = [
        (record["value"] - reference) / scale for record in records if record["value"] is not None
    ]
    places = [record[against] for record in records if record["value"] is not None]
    _curve(ax, places, _beyond_rounding(values), against, quantity_style("gap"), label)
    return _labelled(ax, "relative gap  $(f - f^*)/f^*$")


def gradient_norm(
    ax: Axes, records: Records, *, against: str = "step", label: str | None = None
) -> Axes:
    """Gradient norm in the solver's variables against ``step`` or ``seconds``."""
    values = [record["gradient_norm"] for record in records]
    _curve(
        ax,
        [record[against] for record in records],
        values,
        against,
        quantity_style("gradient_norm"),
        label,
    )
    return _labelled(ax, "gradient norm")


def collapse_metrics(ax: Axes, records: Records) -> Axes:
    """NC1-NC4 against step, as far as the log holds them and a logarithmic axis shows them; NC4 as
    its distance from 1.
    """
    logs = [{**r, "nc4": None if r.get("nc4") is None else 1.0 - r["nc4"]} for r in records]
    return curves(ax, logs, _LABELS)


def curves(ax: Axes, records: Records, names: Mapping[str, str], *, against: str = "step") -> Axes:
    """Columns of the log, those of ``names`` with their labels, each in its colour, as far as they
    are beyond rounding.
    """
    for number, (name, label) in enumerate(names.items()):
        found = [
            (record[against], record[name]) for record in records if record.get(name) is not None
        ]
        values = _beyond_rounding([value for _, value in found])
        if any(map(_shown, values)):
            _curve(
                ax,
                [place for place, _ in found],
                values,
                against,
                quantity_style(name, number),
                label,
            )
    return _labelled(ax, "distance from collapse")


def layer_metric(ax: Axes, records: Records, name: str, *, title: str) -> Axes:
    """A metric of each layer's input against step, ``layer0/name`` of H first: a curve a layer,
    from light to dark.
    """
    import matplotlib

    keys: list[str] = []
    while any(f"layer{len(keys)}/{name}" in record for record in records):
        keys.append(f"layer{len(keys)}/{name}")
    shades = matplotlib.colormaps["viridis_r"](np.linspace(0.1, 0.95, max(len(keys), 1)))
    for j, key in enumerate(keys):
        values = _beyond_rounding([record.get(key) for record in records])
        if any(map(_shown, values)):
            label = "H" if j == 0 else f"after layer {j}"
            _curve(
                ax,
                [record["step"] for record in records],
                values,
                "step",
                {"color": shades[j]},
                label,
            )
    return _labelled(ax, title)


def _curve(
    ax: Axes,
    places: Sequence[float],
    values: Sequence[float | None],
    against: str,
    style: Mapping[str, Any],
    label: str | None,
) -> None:
    kept = [(x, y) for x, y in zip(places, values, strict=True) if _shown(y)]
    x, y = [place for place, _ in kept], [value for _, value in kept]
    ax.plot(x, y, **style, marker="o" if len(x) <= FEW else "", markersize=2.5, label=label)
    ax.set_yscale("log")
    if against == "step":
        _fit_steps(ax)
    ax.set_xlabel(against)


def _labelled(ax: Axes, title: str) -> Axes:
    ax.set_ylabel(title)
    return ax


def _fit_steps(ax: Axes) -> None:
    """Steps logarithmic from 10 on where there are many, and none of any curve out of sight, on
    axes that share theirs too.
    """
    together = ax.get_shared_x_axes().get_siblings(ax)
    last = max(
        (float(x) for one in together for line in one.lines for x in np.asarray(line.get_xdata())),
        default=0.0,
    )
    if last > 200:
        ax.set_xscale("symlog", linthresh=10)
        ax.set_xlim(-1, 1.15 * last)


def _beyond_rounding(values: Sequence[float | None]) -> list[float | None]:
    """What is zero but for rounding would be drawn as a trend."""
    return [None if value is not None and value < ROUNDING else value for value in values]


def band(
    ax: Axes,
    runs: Sequence[Records],
    name: str,
    *,
    against: str = "step",
    label: str | None = None,
    style: int | None = None,
) -> Axes:
    """Quantity ``name`` of the logs of several runs that differ in their seed: the median, and a
    band from least to most.

    Logs are read at the places of their union, by interpolation of the logarithm, as far as half of
    the runs go.
    ``style``: the number of the curve for ``line_style``, where the axes do not hold all curves;
    else the next one.
    """
    logs = [log for records in runs if (log := _logarithms(records, name, against))[0]]
    ends = sorted((x[-1] for x, _ in logs), reverse=True)
    places = sorted({place for x, _ in logs for place in x if place <= ends[(len(ends) - 1) // 2]})
    rows = [np.interp(places, x, y, left=math.nan, right=math.nan) for x, y in logs]
    if not rows:
        return ax
    table = np.exp(np.stack(rows))
    middle = np.nanmedian(table, axis=0)
    drawn = line_style(len(ax.lines) if style is None else style)
    _curve(ax, places, [float(value) for value in middle], against, drawn, label)
    if len(rows) > 1:
        low, high = np.nanmin(table, axis=0), np.nanmax(table, axis=0)
        ax.fill_between(places, low, high, color=drawn["color"], alpha=0.2, linewidth=0)
    return _labelled(ax, name)


def _logarithms(records: Records, name: str, against: str) -> tuple[list[float], list[float]]:
    values = [record.get(name) for record in records]
    if name != "gradient_norm":  # which is small where penalties are
        values = _beyond_rounding(values)
    kept = [
        (record[against], math.log(y))
        for record, y in zip(records, values, strict=True)
        if _shown(y)
    ]
    return [x for x, _ in kept], [y for _, y in kept]


def _shown(value: float | None) -> TypeGuard[float]:
    """Whether a logarithmic axis can show the value."""
    return value is not None and 0 < value < _LARGEST


def strips(ax: Axes, values: Mapping[str, Sequence[float]], *, label: str) -> Axes:
    """A column of dots, one a seed, for each name, with a line at the median."""
    for place, numbers in enumerate(values.values()):
        colour = COLOURS[place % len(COLOURS)]
        ax.plot([place] * len(numbers), numbers, "o", color=colour)
        ax.plot([place - 0.3, place + 0.3], [median(numbers)] * 2, color=colour)
    if any(len(numbers) > 1 for numbers in values.values()):
        ax.plot([], [], "o", color=VALUE, label="a seed")
        ax.plot([], [], color=VALUE, label="median over seeds")
    ax.set_xticks(range(len(values)), list(values), rotation=20, ha="right")
    ax.set_xlim(-0.6, len(values) - 0.4)
    return _labelled(ax, label)
