"""Harun and Kanan, A good start matters: continual learning with data-driven weight initialisation,
arXiv 2503.06385.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from ufm_fast import plots
from ufm_fast.networks import load
from ufm_fast.networks.switch import OPTIONS, VARIANTS, Switch, switches
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import median

PAPER = "Harun and Kanan, CoLLAs 2025, arXiv 2503.06385"
MOST_STEPS = 300
RANDOM, ALL_ROWS = "random", "least squares, all rows"


def _spike(quick: bool) -> Evidence:
    data, rows = load("digits"), []
    options = replace(OPTIONS, steps=600) if quick else OPTIONS
    for seed in range(1 if quick else 5):
        rows += list(switches(data, replace(options, seed=seed), most_steps=MOST_STEPS))
    loss, steps, accuracy = (
        {name: [read(row) for row in rows if row.variant == name] for name in VARIANTS}
        for read in (lambda row: row.loss, _steps, lambda row: row.accuracy)
    )
    numbers = {
        "loss after the switch, random / least squares": median(loss[RANDOM])
        / median(loss[ALL_ROWS]),
        "steps, random / least squares": median(steps[RANDOM]) / max(median(steps[ALL_ROWS]), 1),
        **{f"loss after the switch, {name}": median(loss[name]) for name in VARIANTS},
        **{f"test accuracy then, {name}": median(accuracy[name]) for name in VARIANTS},
        **{f"steps, {name}": median(steps[name]) for name in VARIANTS},
    }
    drawn, axes = plots.panels(3)
    labels = ("loss after the switch", "test accuracy then", "steps to loss .1")
    for ax, values, label in zip(axes, (loss, accuracy, steps), labels, strict=True):
        plots.strips(
            ax,
            {name.replace("least squares", "LS"): numbers_ for name, numbers_ in values.items()},
            label=label,
        )
    return Evidence(numbers, [asdict(row) for row in rows], drawn)


def _steps(row: Switch) -> float:
    return float(MOST_STEPS if row.steps is None else row.steps)


ROWS = (
    Claim(
        "harun2025-spike",
        PAPER,
        "Least-squares rows for new classes take away the spike of the loss, and training adapts "
        "in fewer steps.",
        "ConvNeXt, ImageNet-1K to Places365; lambda .05",
        "digits 0-4 then all ten with replay, MLP 128-128 without a last bias, mse, SGD .05/.9, "
        "lambda = decay = 5e-4, 5 seeds",
        (
            Quantity("loss after the switch, random / least squares", 2.0, 0.0, "at least"),
            Quantity("steps, random / least squares", 3.0, 0.0, "at least"),
            *(
                Quantity(f"{quantity}, {name}")
                for quantity in ("loss after the switch", "test accuracy then", "steps")
                for name in VARIANTS
            ),
        ),
        _spike,
        seconds=60,
        quick="600 steps before the switch, one seed",
        quick_seconds=5,
    ),
)
