"""Curves of many solves against a setting: what is on the axes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ufm_fast import curves, plots
from ufm_fast.errors import InputError

TABLE = {
    "ratio": [100, 1, 10, 3],
    "lambda": [1e-2, 1e-3, 1e-4, 1e-5],
    "count": [1, 2, 4, 8],
    "cosine": [1.0, -0.1, 0.2, math.nan],
}


@pytest.mark.parametrize(
    ("draw", "setting"),
    [
        (curves.against_imbalance, "ratio"),
        (curves.against_penalty, "lambda"),
        (curves.against_counts, "count"),
    ],
)
def test_points_are_in_order_without_what_is_missing(draw, setting):
    ax = plots.new_figure().subplots()
    assert draw(ax, TABLE, {"cosine": "minority"}) is ax
    (line,) = ax.lines
    kept = sorted((x, y) for x, y in zip(TABLE[setting], TABLE["cosine"], strict=True) if y == y)
    assert np.array_equal(line.get_xydata(), np.array(kept))
    assert ax.get_xscale() == "log"
    assert line.get_label() == "minority"


def test_theory_is_a_line_of_the_same_colour_and_a_threshold_stands_across():
    ax = plots.new_figure().subplots()
    theory = {"ratio": [1, 30, 100], "cosine": [-0.1, 0.6, 1.0]}
    curves.against(
        ax,
        {**TABLE, "other": [1, 2, 3, 4]},
        "ratio",
        {"cosine": "a", "other": "b"},
        theory=theory,
        threshold=12.19,
        scale="linear",
    )
    points, line, other, across = ax.lines
    assert points.get_linestyle() == "None"
    assert line.get_color() == points.get_color() != other.get_color()
    assert line.get_xdata().tolist() == theory["ratio"]
    assert set(across.get_xdata()) == {12.19}
    assert ax.get_xscale() == "linear"


def test_columns_that_do_not_fit_are_named():
    ax = plots.new_figure().subplots()
    with pytest.raises(InputError, match="no column loss"):
        curves.against_imbalance(ax, TABLE, {"loss": "loss"})
    with pytest.raises(InputError, match="cosine has 2 entries and ratio has 4"):
        curves.against_imbalance(ax, {**TABLE, "cosine": [1, 2]}, {"cosine": "c"})
