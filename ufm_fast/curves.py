"""Figures of many solves: quantities against what was changed between them. As in `plots`, axes
come and go, and `plots.finish` gives ticks and legend.

A table is a mapping of columns with an entry for each solve, as studies and `reproduce` have them;
nan entries are left out. What is measured is points, what is predicted a line of the same colour, a
threshold of theory a dashed line across.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ufm_fast.errors import InputError
from ufm_fast.plots import COLOURS, THEORY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = Mapping[str, Sequence[float]]


def against_imbalance(ax: Axes, table: Table, curves: Mapping[str, str], **options: Any) -> Axes:
    """``curves`` {column: label} against the column ``ratio``, samples of a majority class over
    those of a minority class, such as minority collapse (arXiv 2101.12699). Options: those of
    `against`.
    """
    return against(ax, table, "ratio", curves, label="imbalance ratio R", **options)


def against_penalty(ax: Axes, table: Table, curves: Mapping[str, str], **options: Any) -> Axes:
    """The same against the column ``lambda``, such as the way to the limit of no penalty (arXiv
    2208.05512).
    """
    return against(ax, table, "lambda", curves, label="lambda", **options)


def against_counts(ax: Axes, table: Table, curves: Mapping[str, str], **options: Any) -> Axes:
    """The same against the column ``count``, the samples of the classes whose number is changed
    (arXiv 2309.09725).
    """
    return against(ax, table, "count", curves, label="samples of a class", **options)


def against(
    ax: Axes,
    table: Table,
    setting: str,
    curves: Mapping[str, str],
    *,
    theory: Table | None = None,
    threshold: float | None = None,
    label: str = "",
    scale: str = "log",
    colours: Sequence[str] = COLOURS,
) -> Axes:
    """``curves`` {column: label} of ``table`` against its column ``setting``, in ascending order of
    it.

    ``theory``: a table with some of these columns on a grid of its own. ``scale``: of the setting,
    log or linear.
    Errors: InputError for a column that the table has not, or one of another length.
    """
    for number, (name, text) in enumerate(curves.items()):
        colour = colours[number % len(colours)]
        places, values = _columns(table, setting, name)
        known = theory is not None and name in theory
        ax.plot(places, values, "o" if known else "o-", color=colour, label=text, markersize=4)
        if theory is not None and known:
            ax.plot(*_columns(theory, setting, name), color=colour, linewidth=1.2)
    if threshold is not None:
        ax.axvline(threshold, color=THEORY, linestyle="--", linewidth=1.0, label=f"{threshold:.4g}")
    ax.set_xscale(scale)
    ax.set_xlabel(label or setting)
    return ax


def _columns(table: Table, setting: str, name: str) -> tuple[Any, Any]:
    """Two columns in ascending order of the first, without the entries that either lacks."""
    absent = [column for column in (setting, name) if column not in table]
    if absent:
        raise InputError(f"the table has no column {absent[0]}; it has {', '.join(table)}")
    x, y = (np.asarray(table[column], dtype=np.float64) for column in (setting, name))
    if x.shape != y.shape:
        raise InputError(
            f"column {name} has {y.size} entries and {setting} has {x.size}; give one for each "
            f"solve"
        )
    seen = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[seen], kind="stable")
    return x[seen][order], y[seen][order]
