"""Whether a figure can be read: tick labels apart, legends off the data, everything on the page,
one of two widths.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ufm_fast import plots


def assert_legible(figure: Any) -> None:
    """To be called within the style that the figure was drawn in."""
    figure.draw_without_rendering()
    assert figure.get_size_inches()[0] in (plots.COLUMN, plots.PAGE)
    panels = [ax for ax in figure.axes if ax.axison]
    for ax in panels:
        for axis, across in ((ax.xaxis, True), (ax.yaxis, False)):
            boxes = sorted(_labels(axis), key=lambda box: box.x0 if across else box.y0)
            sides = [(a.x1, b.x0) if across else (a.y1, b.y0) for a, b in itertools.pairwise(boxes)]
            turned = any(label.get_rotation() for label in axis.get_majorticklabels())
            assert turned or all(end < begin for end, begin in sides), (
                ax.get_xlabel(),
                ax.get_ylabel(),
                axis,
            )
    page, content = figure.bbox, figure.get_tightbbox().transformed(figure.dpi_scale_trans)
    assert page.x0 - 1 <= content.x0
    assert content.x1 <= page.x1 + 1
    assert page.y0 - 1 <= content.y0
    assert content.y1 <= page.y1 + 1
    assert not any(ax.get_legend() for ax in panels), "a legend inside its panel"
    for legend in figure.legends:
        assert not any(legend.get_window_extent().overlaps(ax.get_tightbbox()) for ax in panels)


def _labels(axis: Any) -> Iterator[Any]:
    low, high = sorted(axis.get_view_interval())
    for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
        if low <= tick.get_loc() <= high and tick.label1.get_text() and tick.label1.get_visible():
            yield tick.label1.get_window_extent()
