"""Li et al., Neural collapse in multi-label learning with pick-all-label loss, arXiv 2310.15903."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ufm_fast import plots
from ufm_fast.networks import Architecture, Options, load, train
from ufm_fast.networks.tags import network_tag_average, tag_average
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, median
from ufm_fast.solving import solve
from ufm_fast.targets import Targets, TargetSets
from ufm_fast.theory import pick_all_minimum

PAPER = "Li et al., ICML 2024, arXiv 2310.15903"
HEADS = ("learned", "etf")
K, PENALTIES, SCALES = 10, (1e-4, 1e-5, 1e-6), (0.8885, 0.9182, 0.9356)
MEASURES = {
    "accuracy": "test accuracy",
    "accuracy_1": "one label",
    "accuracy_2": "two labels",
    "cosine": "cosine to tag average",
    "scale": "$C_2$",
}


def _fixed_head(quick: bool) -> Evidence:
    data = load("digit-pairs")
    rows: Rows = []
    for seed in range(1 if quick else 2):
        for head in HEADS:
            options = Options(
                architecture=Architecture(widths=(128, 128), unbiased=1, head=head),
                loss="pick-all",
                seed=seed,
                steps=1500 if quick else 4000,
            )
            begin = time.perf_counter()
            trained = train(data, options)
            seconds, tags = time.perf_counter() - begin, network_tag_average(trained)
            trainable = sum(p.numel() for p in trained.network.parameters() if p.requires_grad)
            test = {
                name: value for name, value in trained.evaluate("test").items() if name != "loss"
            }
            rows.append(
                {
                    "head": head,
                    "seed": seed,
                    **test,
                    "cosine": tags.cosine,
                    "scale": tags.scale,
                    "trainable": trainable,
                    "seconds": seconds,
                }
            )
    of = {
        name: {head: median([row[name] for row in rows if row["head"] == head]) for head in HEADS}
        for name in rows[0]
        if name not in ("head", "seed")
    }
    numbers = {
        "test accuracies' difference": abs(of["accuracy"]["learned"] - of["accuracy"]["etf"])
    }
    numbers |= {
        f"{name}, {head}": of[name][head] for name in (*MEASURES, "trainable") for head in HEADS
    }
    drawn, axes = plots.panels(len(MEASURES), height=2.0)
    for ax, (name, label) in zip(axes, MEASURES.items(), strict=True):
        plots.strips(
            ax,
            {head: [row[name] for row in rows if row["head"] == head] for head in HEADS},
            label=label,
        )
    return Evidence(numbers, rows, drawn)


def _padded(targets: Targets) -> Tensor:
    """Sets of one or two labels as (R, 2), the second one -1 where there is none."""
    found = torch.full((targets.rows, 2), -1)
    rows, columns = targets.slice(0, targets.rows)
    place = torch.arange(len(rows)) - torch.searchsorted(rows, rows)
    found[rows, place] = columns
    return found


def _tags(quick: bool) -> Evidence:
    pairs = torch.combinations(torch.arange(K))
    sizes = torch.cat([torch.ones(K), torch.full((len(pairs),), 2.0)]).long()
    indptr = torch.cat([torch.zeros(1), sizes.cumsum(0)]).long()
    sets = TargetSets.create(
        indptr, torch.cat([torch.arange(K), pairs.flatten()]), K, torch.where(sizes == 1, 3100, 200)
    )
    rows: Rows = []
    for mu in PENALTIES:
        problem = Problem(
            loss="pick-all", target_sets=sets, classes=K, dim=16, lambda_w=mu, lambda_h=mu
        )
        solution = solve(problem, start="normal", metrics=False)
        tags, theory = (
            tag_average(solution.point.H, _padded(problem.rows().targets)),
            pick_all_minimum(K, {1: 3100, 2: 200}, mu, mu),
        )
        scale = theory.slopes[2] / theory.slopes[1]
        rows.append(
            {
                "penalty": mu,
                "scale": tags.scale,
                "theory": scale,
                "cosine": tags.cosine,
                "value": solution.value,
            }
        )
    numbers = {f"C_2, mu = {row['penalty']:g}": row["scale"] for row in rows}
    numbers["1 - least cosine to the tag average"] = 1 - min(row["cosine"] for row in rows)
    numbers["largest deviation of C_2 from the formula"] = max(
        abs(row["scale"] / row["theory"] - 1) for row in rows
    )
    drawn, (ax,) = plots.panels()
    ax.plot(PENALTIES, [row["scale"] for row in rows], "o", label="found")
    ax.plot(
        PENALTIES,
        [row["theory"] for row in rows],
        color=plots.THEORY,
        linewidth=1.0,
        label="formula",
    )
    ax.set(xscale="log", xlabel="sqrt(lambda$_W$ lambda$_H$)", ylabel="$C_2$")
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "li2023-tags",
        PAPER,
        "The features of a pair of labels are a scaled sum of its labels' class means.",
        "3,100 samples a class and 200 a pair, K = 10; lambda 5e-4 and averaged over batches",
        "d = 16, lambda_W = lambda_H = 1e-4, 1e-5, 1e-6, from a normal start",
        (
            Quantity("largest deviation of C_2 from the formula", 0.0, 1e-8, "absolute"),
            Quantity("1 - least cosine to the tag average", 0.0, 1e-8, "absolute"),
            *(
                Quantity(f"C_2, mu = {mu:g}", value, 1e-4)
                for mu, value in zip(PENALTIES, SCALES, strict=True)
            ),
        ),
        _tags,
        seconds=5,
    ),
    Claim(
        "li2023-fixed-head",
        PAPER,
        "A classifier that is fixed to a simplex ETF tests as well as a learned one, with fewer "
        "parameters to train.",
        "ResNets on multi-label MNIST and CIFAR, SGD .1, wd 5e-4, 200 epochs",
        "digit pairs, MLP 128-128 without a last bias, 4,000 steps, SGD .05/.9, wd 5e-4, medians "
        "over 2 seeds",
        (
            Quantity("test accuracies' difference", 0.0, 0.03, "absolute", quick_tolerance=0.05),
            *(Quantity(f"{name}, {head}") for name in (*MEASURES, "trainable") for head in HEADS),
        ),
        _fixed_head,
        seconds=120,
        quick="1,500 steps, one seed",
        quick_seconds=20,
    ),
)
