"""Li et al., Neural collapse in multi-label learning with pick-all-label loss, arXiv 2310.15903."""

from __future__ import annotations

import time

from ufm_fast.networks import Architecture, Options, load, train
from ufm_fast.networks.tags import network_tag_average
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, figure, median, strips

PAPER = "Li et al., ICML 2024, arXiv 2310.15903"
HEADS = ("learned", "etf")
MEASURES = {
    "accuracy": "test accuracy", "accuracy_1": "one label", "accuracy_2": "two labels", "cosine": "cosine to tag average",
    "scale": "$C_2$",
}  # fmt: skip


def _fixed_head(quick: bool) -> Evidence:
    data = load("digit-pairs")
    rows: Rows = []
    for seed in range(1 if quick else 2):
        for head in HEADS:
            options = Options(
                architecture=Architecture(widths=(128, 128), unbiased=1, head=head), loss="pick-all", seed=seed,
                steps=1500 if quick else 4000,
            )  # fmt: skip
            begin = time.perf_counter()
            trained = train(data, options)
            seconds, tags = time.perf_counter() - begin, network_tag_average(trained)
            trainable = sum(p.numel() for p in trained.network.parameters() if p.requires_grad)
            test = {name: value for name, value in trained.evaluate("test").items() if name != "loss"}
            rows.append({
                "head": head, "seed": seed, **test, "cosine": tags.cosine, "scale": tags.scale, "trainable": trainable,
                "seconds": seconds,
            })  # fmt: skip
    of = {name: {head: median([row[name] for row in rows if row["head"] == head]) for head in HEADS} for name in rows[0]
          if name not in ("head", "seed")}  # fmt: skip
    numbers = {"test accuracies' difference": abs(of["accuracy"]["learned"] - of["accuracy"]["etf"])}
    numbers |= {f"{name}, {head}": of[name][head] for name in (*MEASURES, "trainable") for head in HEADS}
    drawn, axes = figure(len(MEASURES), height=2.0)
    for ax, (name, label) in zip(axes, MEASURES.items(), strict=True):
        strips(ax, {head: [row[name] for row in rows if row["head"] == head] for head in HEADS}, label=label)
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "li2023-fixed-head", PAPER,
        "A classifier that is fixed to a simplex ETF tests as well as a learned one, with fewer parameters to train.",
        "ResNets on multi-label MNIST and CIFAR, SGD .1, wd 5e-4, 200 epochs",
        "digit pairs, MLP 128-128 without a last bias, 4,000 steps, SGD .05/.9, wd 5e-4, medians over 2 seeds",
        (
            Quantity("test accuracies' difference", 0.0, 0.03, "absolute", quick_tolerance=0.05),
            *(Quantity(f"{name}, {head}") for name in (*MEASURES, "trainable") for head in HEADS),
        ),
        _fixed_head, seconds=120, quick="1,500 steps, one seed", quick_seconds=20,
    ),
)  # fmt: skip
