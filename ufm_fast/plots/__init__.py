"""Figures fit to paste into a paper. Each function draws on the axes that it is given; nothing
touches pyplot.

    palette    one colour for one quantity, everywhere
    canvas     figures one or two columns wide, their style, their files
    curves     what changes by step; bands and dots over seeds
    matrices   what a matrix with a row for each class looks like
    finish     ticks, look and the legend, the same for all

Data come as plain numbers: ``records`` is a run's log (a list of flat dictionaries), matrices are
tensors or arrays with a row for each class.

>>> with paper_style():
...     figure, (ax,) = panels()
...     collapse_metrics(ax, records)
...     save(finish(figure), Path("figures"), "collapse")
"""

from ufm_fast.plots.canvas import COLUMN, PAGE, new_figure, panels, paper_style, save, style
from ufm_fast.plots.curves import (
    Records,
    band,
    collapse_metrics,
    curves,
    gradient_norm,
    layer_metric,
    loss_gap,
    strips,
)
from ufm_fast.plots.finish import finish
from ufm_fast.plots.matrices import (
    against_frequency,
    cosine_histogram,
    gram_heatmap,
    pair_cosines,
    spectrum,
)
from ufm_fast.plots.palette import (
    COLOURS,
    QUANTITY_COLOURS,
    THEORY,
    VALUE,
    line_style,
    quantity_style,
)

__all__ = [
    "COLOURS",
    "COLUMN",
    "PAGE",
    "QUANTITY_COLOURS",
    "THEORY",
    "VALUE",
    "Records",
    "against_frequency",
    "band",
    "collapse_metrics",
    "cosine_histogram",
    "curves",
    "finish",
    "gradient_norm",
    "gram_heatmap",
    "layer_metric",
    "line_style",
    "loss_gap",
    "new_figure",
    "pair_cosines",
    "panels",
    "paper_style",
    "quantity_style",
    "save",
    "spectrum",
    "strips",
    "style",
]
