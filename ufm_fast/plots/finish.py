"""The last touch of every figure: ticks that can be read, one look, and one legend below all
panels, off the data.

Whoever draws labels artists and axes and leaves the rest to ``finish``, so that all figures are
alike. Counts (steps, seeds, layers, classes, ..) have whole ticks. A logarithmic axis over less
than two decades has plain numbers in place of powers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

#: Beginnings of the labels of axes that count.
COUNTS = (
    "step",
    "seed",
    "epoch",
    "layer",
    "index",
    "class",
    "pairs",
    "rank",
    "dimension",
    "evaluations",
    "samples",
)
#: Inches that a tick label takes along a horizontal and a vertical axis, with the room about it.
X_ROOM, Y_ROOM = 0.3, 0.35


def finish(
    figure: Figure, handles: Sequence[Any] | None = None, title: str | None = None
) -> Figure:
    """Ticks, look and legend. handles: those of the legend, by default one of each label in the
    panels; title: its head.
    """
    for ax in figure.axes:
        if ax.get_label() == "<colorbar>" or not ax.axison:
            continue
        _look(ax)
        box, (width, height) = ax.get_position(), figure.get_size_inches()
        _ticks(ax.xaxis, box.width * width, across=True)
        _ticks(ax.yaxis, box.height * height, across=False)
    _legend(figure, _labelled(figure) if handles is None else list(handles), title)
    return figure


def _look(ax: Axes) -> None:
    if ax.images:
        return
    ax.set_axisbelow(True)
    ax.grid(True, which="major", color="0.9", linewidth=0.8)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _ticks(axis: Axis, inches: float, across: bool) -> None:
    """As many as their labels leave room for on an axis of that length, eight at most."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    scale = axis.get_scale()
    if isinstance(axis.get_major_locator(), FixedLocator) or scale not in ("linear", "log"):
        return
    low, high = sorted(axis.get_view_interval())
    powers = scale == "log" and high >= 100 * low
    if scale == "log":
        axis.set_minor_formatter(NullFormatter())
        if not powers:
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for most in range(max(2, min(8, int(inches / (X_ROOM if across else Y_ROOM)))), 0, -1):
        axis.set_major_locator(
            _powers(most) if powers else _numbers(axis, most, high / low if scale == "log" else 1.0)
        )
        if powers or not across or _fit(axis, inches, low, high):
            return


def _powers(most: int) -> Locator:
    from matplotlib.ticker import LogLocator

    return LogLocator(numticks=most + 1)


def _numbers(axis: Axis, most: int, ratio: float) -> Locator:
    from matplotlib.ticker import LogLocator, MaxNLocator

    if ratio > 3:
        return LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 20 else (1.0, 3.0))
    whole = axis.get_label_text().startswith(COUNTS)
    return MaxNLocator(most, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1 if whole else 2)


def _fit(axis: Axis, inches: float, low: float, high: float) -> bool:
    """Whether the widest label is narrower than the way from tick to tick, all digits taken for 0.6
    of a letter's height.
    """
    places = [
        place for place in axis.get_major_locator().tick_values(low, high) if low <= place <= high
    ]
    if len(places) < 2 or axis.get_scale() == "log":
        return True
    labels = axis.get_major_formatter().format_ticks(places)
    widest = max(len(label.replace("$\\mathdefault{", "").rstrip("}$")) for label in labels)
    size = float(axis.get_major_ticks(1)[0].label1.get_fontsize())
    return bool((widest + 1) * 0.6 * size / 72 <= inches * (places[1] - places[0]) / (high - low))


def _labelled(figure: Figure) -> list[Any]:
    found: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values())


def _legend(figure: Figure, handles: list[Any], title: str | None) -> None:
    """In as few rows as the figure's width takes."""
    for columns in range(len(handles), 0, -1):
        made = figure.legend(
            handles=handles,
            title=title,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            columnspacing=1.2,
            handlelength=1.6,
        )
        if columns == 1 or made.get_window_extent().width <= 0.95 * figure.bbox.width:
            return
        made.remove()
