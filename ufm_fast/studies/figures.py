"""Figures of a study: any column against any axis, over seeds, for a column of a paper.

A curve goes through the medians, and its band from least to most of all cells at that place that
differ in seed (or in whatever axis the figure does not show); a column of true and false is a
share, whose band is Wilson's 95 % interval. The legend says which. Axes whose numbers are all
positive and span more than a factor of three are logarithmic; where both are, a line is fitted
(`show.slope`) and the legend has its slope with the interval.

A quantity has one colour in every figure (`plots.QUANTITY_COLOURS`); curves of one quantity differ
in marker, dashes and shade. ``lines`` makes a curve for each value of an axis, ``across`` a panel.
The legend stands below the panels, where nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ufm_fast import plots
from ufm_fast.errors import InputError
from ufm_fast.runs.files import sweep
from ufm_fast.studies.folder import StudyFolder
from ufm_fast.studies.show import Slope, check_column, finished, slope
from ufm_fast.studies.spec import Plot, Study, finite
from ufm_fast.studies.table import Row, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PER_ROW = 3
_MARKERS, _DASHES = "os^vDPX<>*", ("-", "--", ":", "-.")
#: What theory says beside a column.
_LEVELS = {
    name: {"simplex": "simplex_level", "Welch": "welch_level"}
    for name in ("max_cosine_classifier", "max_cosine_means")
}
_LABELS = {
    "classes": "classes K",
    "dim": "dimension d",
    "seconds_per_evaluation": "seconds an evaluation",
    "peak_extra_bytes": "extra peak memory, bytes",
    "peak_bytes": "peak memory, bytes",
    "max_cosine_classifier": "largest cosine of W",
    "relative_gap": "certified relative gap",
    "one_vs_rest": "one-vs-rest margin",
    "certified": "share certified",
    "symmetric": "share of symmetric solutions",
    "lambda_w": "λ$_W$",
    "lambda_h": "λ$_H$",
}


@dataclass(frozen=True)
class Fitted:
    """A curve of a figure and its slope."""

    plot: Plot
    label: str
    panel: str
    slope: Slope


@dataclass
class _Legend:
    """What the figure says below its panels: handles by label, the slopes of each label's curves,
    panel by panel.
    """

    entries: dict[str, Any] = field(default_factory=dict)
    slopes: dict[str, list[str]] = field(default_factory=dict)
    fits: list[Fitted] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        return [self._label(name) for name in self.entries]

    def _label(self, name: str) -> str:
        found = self.slopes.get(name, [])
        parts = [found[place : place + _PER_ROW] for place in range(0, len(found), _PER_ROW)]
        return ": slope ".join(filter(None, (name, ";\n".join(map("; ".join, parts)))))


def draw_study(folder: StudyFolder, wanted: Sequence[Plot] = ()) -> tuple[list[Path], list[Fitted]]:
    """Draw figures into the folder's plots/: those wanted, or those of the study, or the usual
    ones; paths and slopes.

    Errors: InputError without matplotlib, without a finished cell, and for a column that has no
    numbers.
    """
    rows = read_rows(folder)
    target = folder.path / "plots"
    if target.is_symlink():
        raise InputError(
            f"study: {target} is a link to another place, where nothing is written; remove it"
        )
    paths, fits = [], []
    with plots.paper_style():
        axes = [name for name in folder.study.varied if name not in folder.study.derived]
        figures = [
            (plot, *make_figure(rows, plot, axes)) for plot in wanted or _usual(folder.study, rows)
        ]
        target.mkdir(exist_ok=True)
        sweep(target)
        for plot, figure, found in figures:
            paths += plots.save(figure, target, plot.name)
            fits += found
    return paths, fits


def _usual(study: Study, rows: Sequence[Row]) -> Sequence[Plot]:
    """The figures of the file; else time, evaluations and value against the axis with the most
    numbers, if one has any.
    """
    if study.plots:
        return study.plots
    names = [
        name for name in study.varied if name != "seed" and all(finite(row[name]) for row in rows)
    ]
    numeric = {name: len({row[name] for row in rows}) for name in names}
    if not numeric:
        return ()
    against = max(numeric, key=lambda name: numeric[name])
    others = [name for name in study.varied if name not in (against, "seed", *study.derived)]
    lines, across = ([*others, None, None])[:2]
    found = [
        name
        for name in ("seconds_per_evaluation", "evaluations", "value")
        if _has_numbers(rows, name)
    ]
    return [Plot(f"{name}-{against}", name, against, lines, across) for name in found]


def _has_numbers(rows: Sequence[Row], column: str) -> bool:
    return any(finite(row.get(column)) for row in finished(rows))


def make_figure(
    rows: Sequence[Row], plot: Plot, axes_of_study: Sequence[str]
) -> tuple[Figure, list[Fitted]]:
    """One figure and the slopes in it. Errors: InputError for a column without numbers."""
    check_column(rows, plot.column)
    check_column(rows, plot.against)
    done = finished(rows)
    panels = _values(done, plot.across)
    columns = min(len(panels), _PER_ROW)
    lines = math.ceil(len(panels) / columns)
    legend = _Legend()
    width = plots.COLUMN if columns == 1 else plots.PAGE
    figure = plots.new_figure(
        width, (0.7 * plots.COLUMN if columns == 1 else 0.85 * width / columns) * lines
    )
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for ax, value in zip(axes.flat, panels, strict=False):
        chosen = [row for row in done if plot.across is None or row.get(plot.across) == value]
        title = "" if plot.across is None else f"{_name(plot.across)} = {_word(value)}"
        ax.set_title(title)
        _panel(ax, chosen, plot, _values(done, plot.lines), legend)
    _scales(axes, done, plot)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    _finish(figure, legend, done, plot, axes_of_study)
    return figure, legend.fits


def _panel(
    ax: Axes, rows: Sequence[Row], plot: Plot, lines: Sequence[Any], legend: _Legend
) -> None:
    for number, value in enumerate(lines):
        chosen = [row for row in rows if plot.lines is None or row.get(plot.lines) == value]
        style = _style(plot.column, number, len(lines))
        curve = _curve(chosen, plot)
        if not curve:
            continue
        x, low, middle, high = (np.array(part) for part in zip(*curve, strict=True))
        (drawn,) = ax.plot(x, middle, **style)
        if bool(np.any(high > low)):
            ax.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)
        label = "cells" if plot.lines is None else f"{_name(plot.lines)} = {_word(value)}"
        found = (
            slope(chosen, plot.column, plot.against) if _logarithmic(rows, plot.column) else None
        )
        if found is not None and _logarithmic(rows, plot.against):
            legend.fits.append(Fitted(plot, label, ax.get_title(), found))
            legend.slopes.setdefault(label, []).append(found.words)
            places = np.array([x.min(), x.max()])
            centre = np.exp(np.mean(np.log(middle)) - found.value * np.mean(np.log(x)))
            ax.plot(places, centre * places**found.value, color="0.6", linewidth=0.7, zorder=0)
        legend.entries.setdefault(label, drawn)
        _levels(ax, chosen, plot, legend)


def _levels(ax: Axes, rows: Sequence[Row], plot: Plot, legend: _Legend) -> None:
    """What theory says at each place of a curve."""
    for (name, column), dashes in zip(
        _LEVELS.get(plot.column, {}).items(), ("--", ":"), strict=False
    ):
        known = [row for row in rows if finite(row.get(column)) and finite(row.get(plot.against))]
        level = sorted({(row[plot.against], row[column]) for row in known})
        (drawn,) = ax.plot(*zip(*level, strict=True), color="0.3", linestyle=dashes, linewidth=1.0)
        legend.entries.setdefault(f"{name} level", drawn)


def _curve(rows: Sequence[Row], plot: Plot) -> list[tuple[float, float, float, float]]:
    """(place, low, middle, high), ascending."""
    found: dict[float, list[Any]] = {}
    for row in rows:
        value = row.get(plot.column)
        if finite(row.get(plot.against)) and (finite(value) or isinstance(value, bool)):
            found.setdefault(float(row[plot.against]), []).append(value)
    return [(place, *_band(found[place])) for place in sorted(found)]


def _band(values: Sequence[Any]) -> tuple[float, float, float]:
    if all(isinstance(value, bool) for value in values):
        from scipy.stats import binomtest  # type: ignore[attr-defined]

        interval = binomtest(sum(values), len(values)).proportion_ci(method="wilson")
        return float(interval.low), sum(values) / len(values), float(interval.high)
    return float(min(values)), float(np.median(values)), float(max(values))


def _logarithmic(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if finite(row.get(name))]
    return bool(values) and min(values) > 0 and max(values) > 3 * min(values)


def _scales(axes: Any, rows: Sequence[Row], plot: Plot) -> None:
    """Logarithms where they serve, and labels at the outer axes."""
    for ax in axes.flat:
        if _logarithmic(rows, plot.column):
            ax.set_yscale("log")
        if _logarithmic(rows, plot.against):
            ax.set_xscale("log")
    for ax in axes[-1, :]:
        ax.set_xlabel(_name(plot.against))
    for ax in axes[:, 0]:
        ax.set_ylabel(_name(plot.column))


def _finish(
    figure: Figure, legend: _Legend, rows: Sequence[Row], plot: Plot, varied: Sequence[str]
) -> None:
    """A legend that says what the bands are."""
    shown = (plot.against, plot.lines, plot.across)
    merged = [name for name in varied if name not in shown and len(_values(rows, name)) > 1]
    figure.set_figheight(figure.get_figheight() + 0.14 * (len(legend.entries) + 1.5))
    for label, handle in zip(legend.labels, legend.entries.values(), strict=True):
        handle.set_label(label)
    plots.finish(figure, list(legend.entries.values()), _meaning(rows, plot, merged))


def _meaning(rows: Sequence[Row], plot: Plot, merged: Sequence[str]) -> str:
    seeds = len(_values(rows, "seed"))
    over = " and ".join(f"{seeds} seeds" if name == "seed" else _name(name) for name in merged)
    if not over:
        return "one cell a point"
    if any(isinstance(row.get(plot.column), bool) for row in rows):
        return f"share over {over}; band: 95 % (Wilson)"
    return f"median over {over}; band: least to most"


def _values(rows: Sequence[Row], name: str | None) -> list[Any]:
    """The values of an axis in the order of the table; one None where there is no axis."""
    return [None] if name is None else list(dict.fromkeys(_hashable(row.get(name)) for row in rows))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _style(column: str, number: int, count: int) -> dict[str, Any]:
    """The quantity's colour, lighter from curve to curve, with a marker and dashes of its own."""
    from matplotlib.colors import to_rgb

    base = np.array(to_rgb(plots.QUANTITY_COLOURS.get(column, plots.COLOURS[5])))
    shade = 0.6 * number / max(count - 1, 1) if count > 1 else 0.0
    style: Mapping[str, Any] = {
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }
    return {
        **style,
        "color": tuple(base + shade * (1.0 - base)),
        "linewidth": 1.3,
        "markersize": 3.5,
    }


def _name(column: str) -> str:
    return _LABELS.get(column, column)


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
