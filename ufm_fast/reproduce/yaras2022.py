"""Yaras et al., Neural collapse with normalised features, arXiv 2209.09211."""

from __future__ import annotations

from ufm_fast.networks import Architecture, Options, Training, load
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, figure, median, steps_to_accuracy, strips

PAPER = "Yaras et al., NeurIPS 2022, arXiv 2209.09211"
TEMPERATURE, GOAL, EVERY, MOST = 10.0, 0.99, 10, 2000
HEADS = {"plain": None, f"unit features, t = {TEMPERATURE:g}": TEMPERATURE}


def _network(quick: bool) -> Evidence:
    data = load("digits")
    rows: Rows = []
    for seed in range(1 if quick else 3):
        for name, temperature in HEADS.items():
            architecture = Architecture(widths=(128, 128), unbiased=1, normalised=temperature)
            options = Options(architecture=architecture, schedule="constant", steps=MOST, seed=seed)
            steps = steps_to_accuracy(Training(data, options), GOAL, EVERY)
            rows.append({"head": name, "seed": seed, "steps": MOST if steps is None else steps, "reached": steps is not None})
    steps_of = {name: [row["steps"] for row in rows if row["head"] == name] for name in HEADS}
    plain, unit = (median(steps_of[name]) for name in HEADS)
    drawn, (ax,) = figure()
    strips(ax, steps_of, label="steps to 99 %")
    numbers = {"steps, unit / plain": unit / plain, "steps, plain": plain, "steps, unit": unit}
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "yaras2022-network", PAPER, "With unit features and classifier rows a network fits its training set in fewer steps.",
        "ResNets on CIFAR, t = 1, logits t <w, h>, rows renormalised after each step",
        "digits, MLP 128-128 without a last bias, ce, t = 10, SGD .05/.9, normalised in the forward pass, medians over 3 seeds",
        (Quantity("steps, unit / plain", 1.0, 0.0, "at most"), Quantity("steps, plain"), Quantity("steps, unit")),
        _network, seconds=60, quick="one seed", quick_seconds=10,
    ),
)  # fmt: skip
