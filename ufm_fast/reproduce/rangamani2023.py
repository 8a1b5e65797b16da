"""Rangamani et al., Feature learning in deep classifiers through intermediate neural collapse, PMLR
202:28729.
"""

from __future__ import annotations

import itertools

from ufm_fast import plots
from ufm_fast.networks import Architecture, Options, load, train
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import by_layer

PAPER = "Rangamani et al., ICML 2023, PMLR 202:28729"
DEPTH = 5


def _layers(quick: bool) -> Evidence:
    options = Options(
        architecture=Architecture(widths=(128,) * DEPTH, unbiased=1),
        loss="mse",
        steps=1500 if quick else 6000,
    )
    layers = by_layer(train(load("digits"), options), mismatch=True)
    rows = [{"layer": number, **layer.numbers()} for number, layer in enumerate(layers, 1)]
    quotient, aligned = [row["nc1_quotient"] for row in rows], [row["alignment"] for row in rows]
    numbers = {
        "largest NC1 quotient / that of the layer before": max(
            b / a for a, b in itertools.pairwise(quotient)
        ),
        "alignment, least of the last two - first": min(aligned[-2:]) - aligned[0],
        "mismatch, largest of the last three layers": max(row["mismatch"] for row in rows[-3:]),
        **{f"NC1 quotient, layer {number}": value for number, value in enumerate(quotient, 1)},
        **{f"alignment, layer {number}": value for number, value in enumerate(aligned, 1)},
    }
    drawn, axes = plots.panels(3, height=2.1)
    shown = {"nc1_quotient": "NC1 quotient", "mismatch": "mismatch", "alignment": "alignment"}
    for ax, (name, label) in zip(axes, shown.items(), strict=True):
        ax.plot(
            range(1, DEPTH + 1),
            [row[name] for row in rows],
            marker="o",
            **plots.quantity_style(name),
        )
        ax.set(xlabel="layer", ylabel=label)
    axes[0].set_yscale("log")
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "rangamani2023-layers",
        PAPER,
        "Within-class variance falls against between-class variance from layer to layer, and in "
        "the top layers weights and "
        "class means align.",
        "MLPs, VGG and ResNets on MNIST and CIFAR; squared error",
        "digits, MLP of 5 layers of 128, mse, 6,000 steps, wd 5e-4",
        (
            Quantity("largest NC1 quotient / that of the layer before", 1.0, 0.0, "at most"),
            Quantity("alignment, least of the last two - first", 0.0, 0.0, "at least"),
            Quantity(
                "mismatch, largest of the last three layers",
                0.0,
                0.0,
                "at most",
                quick_tolerance=0.02,
            ),
            *(
                Quantity(f"{name}, layer {n}")
                for name in ("NC1 quotient", "alignment")
                for n in range(1, DEPTH + 1)
            ),
        ),
        _layers,
        seconds=45,
        quick="1,500 steps",
        quick_seconds=6,
    ),
)
