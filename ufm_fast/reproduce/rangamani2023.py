"""Rangamani et al., Feature learning in deep classifiers through intermediate neural collapse, PMLR
202:28729.
"""

from __future__ import annotations

import itertools
from functools import partial

from ufm_fast import plots
from ufm_fast.networks import Architecture, Options, load, train
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import by_layer

PAPER = "Rangamani et al., ICML 2023, PMLR 202:28729"
DEPTH = 5


def _layers(quick: bool, data: str, steps: tuple[int, int]) -> Evidence:
    options = Options(
        architecture=Architecture(widths=(128,) * DEPTH, unbiased=1),
        loss="mse",
        steps=steps[quick],
    )
    layers = by_layer(train(load(data), options), mismatch=True)
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


def _claim(
    name: str,
    data: str,
    steps: tuple[int, int],
    mismatch: tuple[float, float],
    *,
    seconds: float,
    quick_seconds: float,
) -> Claim:
    """steps, mismatch: of the full and the quick setting; images that are not fitted yet may leave
    so much mismatch in the last three layers.
    """
    return Claim(
        f"rangamani2023-{name}",
        PAPER,
        "Within-class variance falls against between-class variance from layer to layer, and in "
        "the top layers weights and class means align.",
        "MLPs, VGG and ResNets on MNIST and CIFAR; squared error",
        f"{data}, MLP of 5 layers of 128, mse, {steps[0]:,} steps, wd 5e-4",
        (
            Quantity("largest NC1 quotient / that of the layer before", 1.0, 0.0, "at most"),
            Quantity("alignment, least of the last two - first", 0.0, 0.0, "at least"),
            Quantity(
                "mismatch, largest of the last three layers",
                0.0,
                mismatch[0],
                "at most",
                quick_tolerance=mismatch[1],
            ),
            *(
                Quantity(f"{name}, layer {n}")
                for name in ("NC1 quotient", "alignment")
                for n in range(1, DEPTH + 1)
            ),
        ),
        partial(_layers, data=data, steps=steps),
        seconds=seconds,
        quick=f"{steps[1]:,} steps",
        quick_seconds=quick_seconds,
    )


ROWS = (
    _claim("layers", "digits", (6000, 1500), (0.0, 0.02), seconds=45, quick_seconds=6),
    _claim("mnist5k", "mnist5k", (4000, 1000), (0.01, 0.05), seconds=30, quick_seconds=10),
)
