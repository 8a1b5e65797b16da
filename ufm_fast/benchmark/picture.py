"""The picture of what was measured: heads, their memory, and digits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ufm_fast.benchmark.claims import Row
from ufm_fast.plots.canvas import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEAST = 1e-9  # what is exact is drawn here


def picture(found: dict[str, list[Row]]) -> Figure:
    """Percent of the products' rate, extra memory, and the error of a loss near collapse."""
    figure = new_figure(10.0, 3.2)
    rate, memory, digits = figure.subplots(1, 3)
    labels = [f"{row['contender']}\n({row['N']}, {row['K']}, {row['d']})" for row in found["heads"]]
    rate.barh(labels, [row["percent_of_products"] for row in found["heads"]], color="tab:blue")
    rate.set_xlabel("percent of the products' rate")
    held = [
        (label, row["extra_bytes"])
        for label, row in zip(labels, found["heads"], strict=True)
        if row["extra_bytes"]
    ]
    memory.barh(
        [label for label, _ in held], [size / 2**20 for _, size in held], color="tab:orange"
    )
    memory.set_xlabel("peak extra memory, MiB")
    margins = [row["margin"] for row in found["digits"]]
    for name in ("ufm_fast drop-in", "torch"):
        digits.semilogy(
            margins, [max(row[name], _LEAST) for row in found["digits"]], marker="o", label=name
        )
    digits.set_xlabel("margin, nats")
    digits.set_ylabel("relative error of the float32 loss")
    digits.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    for axes in (rate, memory):
        axes.tick_params(axis="y", labelsize=6)
        axes.invert_yaxis()
    figure.set_layout_engine("constrained")
    return figure
