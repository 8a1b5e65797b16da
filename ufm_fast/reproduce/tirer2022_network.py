"""Tirer and Bruna's last experiment: the extended model beside a network, layer by layer."""

from __future__ import annotations

from ufm_fast.networks import Architecture, Options, Training, load
from ufm_fast.networks.overlay import compare, model_run, tail_of
from ufm_fast.networks.overlay_figure import BARS, MATCHINGS, overlay_figure
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import Rows, median
from ufm_fast.solvers.minimise import log_spaced

PAPER = "Tirer and Bruna, ICML 2022, arXiv 2202.08087"
DECAY, WIDTH = 2e-3, 128


def _trained(steps: int, seed: int) -> tuple[Training, Rows]:
    options = Options(
        architecture=Architecture(widths=(WIDTH, WIDTH), unbiased=2),
        loss="mse",
        weight_decay=DECAY,
        steps=steps,
        seed=seed,
    )
    training, rows, spaced = Training(load("digits"), options), [], log_spaced(per_decade=10)
    while training.step < steps:
        training.run(until=min(max(next(spaced), training.step), steps))
        rows.append({"seed": seed, "step": training.step, **tail_of(training).collapse()})
    return training, rows


def _network(quick: bool) -> Evidence:
    seeds, steps = (1, 2500) if quick else (3, 6000)
    runs = [_trained(steps, seed) for seed in range(seeds)]
    tails = [tail_of(training) for training, _ in runs]
    table = compare(tails, DECAY)
    rows = {row["quantity"]: row for row in table}
    measured = [tail.numbers() | tail.collapse() for tail in tails]
    numbers = {
        "largest off-diagonal / diagonal": median(
            [m["largest off-diagonal"] / m["diagonal"] for m in measured]
        ),
        "|W_2|^2 / |W_1|^2": rows["|W_2|^2 / |W_1|^2"]["measured"],
        "NC1 quotient, layer 2 / layer 1": median(
            [m["layer1/nc1_quotient"] / m["layer0/nc1_quotient"] for m in measured]
        ),
    }
    for matching in MATCHINGS:
        numbers[f"lambda_H by {matching}"] = rows["lambda_H"][matching]
        numbers |= {
            f"measured / predicted by {matching}, {name}": rows[name][f"ratio, {matching}"]
            for name in BARS
        }
    model = model_run(tails[0], DECAY, 200 if quick else 1000)
    drawn = overlay_figure([rows for _, rows in runs], model, table)
    return Evidence(numbers, table + [row for _, rows in runs for row in rows], drawn)


ROWS = (
    Claim(
        "tirer2022-network",
        PAPER,
        "The extended model predicts the geometry of a network's last two layers; the size of its "
        "loss it does not.",
        "ResNet18 with two more layers on MNIST, SGD",
        "digits, MLP 128-128, last two layers without bias, mse, lambda 2e-3, 6,000 steps, "
        "medians over 3 seeds",
        (
            Quantity("largest off-diagonal / diagonal", 0.0, 0.05, "absolute", quick_tolerance=0.1),
            Quantity("|W_2|^2 / |W_1|^2", 1.0, 0.05, quick_tolerance=0.5),
            Quantity("NC1 quotient, layer 2 / layer 1", 1.0, 0.0, "at most"),
            Quantity("lambda_H by balance"),
            Quantity("lambda_H by gap"),
            *(
                Quantity(f"measured / predicted by {m}, {name}")
                for m in ("balance", "gap")
                for name in BARS
            ),
        ),
        _network,
        seconds=90,
        quick="2,500 steps, one seed",
        quick_seconds=20,
    ),
)
