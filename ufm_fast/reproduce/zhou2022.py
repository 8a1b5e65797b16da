"""Zhou et al., Are all losses created equal: a neural collapse perspective, arXiv 2210.02192."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ufm_fast import plots
from ufm_fast.landscape import smallest_curvature
from ufm_fast.networks import Options, load, train
from ufm_fast.objective import Objective
from ufm_fast.problem import Problem
from ufm_fast.reproduce.claim import Claim, Evidence, Quantity
from ufm_fast.reproduce.common import TO_SIMPLEX, Rows, by_layer, median, trajectory
from ufm_fast.solving import solve

PAPER = "Zhou et al., NeurIPS 2022, arXiv 2210.02192"
N_EACH = 5
SIZES: dict[str, Any] = {
    "classes": 10,
    "dim": 16,
    "per_class": N_EACH,
    "lambda_w": 5e-4,
    "lambda_h": 5e-4,
}
KINDS = ("zero", "pairs of classes as one", "six classes of ten")
#: Loss -> its settings, and the minimum.
LOSSES: dict[str, tuple[dict[str, Any], float]] = {
    "ce": ({"loss": "ce"}, 0.0783967876),
    "mse": ({"loss": "mse", "bias": "free"}, 0.0100060559),
    "smoothing": ({"loss": "ce", "smoothing": 0.05}, 0.3341436005),
    "focal": ({"loss": "focal", "gamma": 3.0}, 0.0374474570),
}
NETWORK = Options(steps=2000, weight_decay=5e-4)


def _losses(quick: bool) -> Evidence:
    numbers, table = {}, []
    drawn, axes = plots.panels(len(LOSSES))
    for ax, (name, (settings, _)) in zip(axes, LOSSES.items(), strict=True):
        problem = Problem(**SIZES, **settings)
        exact = solve(problem, method="lbfgs", start="normal")
        numbers[f"value, {name}"] = exact.value
        steps = 1000 if quick else 20_000
        solution, rows = trajectory(problem, method="momentum", max_steps=steps)
        numbers[f"nc2_classifier, {name}"] = max(
            exact.metrics["nc2_classifier"], solution.metrics["nc2_classifier"]
        )
        for row in rows:
            row["gap"] = abs(row["value"] - exact.value) / exact.value
        table += [{"loss": name, **row} for row in rows]
        plots.curves(ax, rows, TO_SIMPLEX).set(title=name, ylabel="")
    axes[0].set_ylabel("distance")
    return Evidence(numbers, table, drawn)


def _saddles(quick: bool) -> Evidence:
    rows: Rows = []

    def look(kind: str, name: str, W: Tensor, H: Tensor) -> None:
        problem = Problem(**SIZES, **{**LOSSES[name][0], "bias": "none"})
        objective = Objective(problem)
        found = smallest_curvature(objective, objective.from_model(W, H, None))
        theory = problem.mu - _pull(name) * math.sqrt(N_EACH) / problem.num_samples
        rows.append(
            {
                "point": kind,
                "loss": name,
                "eigenvalue": found.eigenvalue,
                "theory": theory,
                "products": found.products,
            }
        )

    nothing = torch.zeros(SIZES["classes"], SIZES["dim"], dtype=torch.float64)
    for name in LOSSES:
        look("zero", name, nothing, nothing)
    for name in ("ce", "smoothing", "mse"):
        look("pairs of classes as one", name, *_pairs(name))
    frame = solve(Problem(**SIZES, loss="mse"), metrics=False).point
    kept = (torch.arange(SIZES["classes"]) < 6).double()[:, None]
    look("six classes of ten", "mse", kept * frame.W, kept * frame.H)
    numbers = {
        f"largest deviation, {kind}": max(
            abs(row["eigenvalue"] / row["theory"] - 1) for row in rows if row["point"] == kind
        )
        for kind in KINDS
    }
    drawn, (ax,) = plots.panels()
    ax.plot(
        [row["theory"] for row in rows], [row["eigenvalue"] for row in rows], "o", label="found"
    )
    ax.axline((-0.04, -0.04), slope=1.0, color=plots.THEORY, linewidth=0.8, label="formula")
    ax.set(xlabel="$\\mu - |G|$ by the formula", ylabel="smallest eigenvalue")
    return Evidence(numbers, rows, drawn)


def _pull(name: str) -> float:
    """What pulls a label's logit up where its class is not told apart from others."""
    p = 1 / int(SIZES["classes"])
    focal: float = (1 - p) ** 3 - 3 * p * (1 - p) ** 2 * math.log(p)
    return {"ce": 1.0, "mse": 1.0, "smoothing": 0.95, "focal": focal}[name]


def _pairs(name: str) -> tuple[Tensor, Tensor]:
    """The best W and class means in which the classes come in five pairs that look alike: a
    critical point.

    Logits a (B - J/5), or b B for the squared error, with B = I_5 x 1_(2 x 2): one number, by its
    derivative.
    """
    K, price = int(SIZES["classes"]), SIZES["lambda_w"] * math.sqrt(N_EACH)
    blocks = torch.eye(K // 2, dtype=torch.float64).repeat_interleave(2, 0).repeat_interleave(2, 1)
    if name == "mse":
        Z = 0.5 * (1 - K * price) * blocks
    else:
        c = 0.8 * _pull(name) - (K - 2) * price
        Z = -math.log((1.6 - 2 * c) / (1.6 + 8 * c)) * (blocks - 2 / K)
    U, s, Vh = torch.linalg.svd(Z * math.sqrt(N_EACH))
    W, A = (torch.zeros(K, SIZES["dim"], dtype=torch.float64) for _ in range(2))
    W[:, :K], A[:, :K] = U * s.sqrt(), Vh.T * s.sqrt()
    return W, A / math.sqrt(N_EACH)


def _networks(quick: bool) -> Evidence:
    data, seeds = load("digits"), range(1 if quick else 3)
    options = replace(NETWORK, steps=300) if quick else NETWORK
    rows: Rows = []
    for loss in LOSSES:
        for seed in seeds:
            trained = train(data, replace(options, loss=loss, seed=seed))
            layer = by_layer(trained)[-1]
            rows.append(
                {
                    "loss": loss,
                    "seed": seed,
                    "accuracy": trained.evaluate("test")["accuracy"],
                    "train_accuracy": trained.evaluate("train")["accuracy"],
                    "nc1_quotient": layer.nc1_quotient,
                }
            )
    accuracy = {
        loss: median([row["accuracy"] for row in rows if row["loss"] == loss]) for loss in LOSSES
    }
    collapse = {
        loss: median([row["nc1_quotient"] for row in rows if row["loss"] == loss])
        for loss in LOSSES
    }
    numbers = {"spread of test accuracies": max(accuracy.values()) - min(accuracy.values())}
    numbers |= {f"NC1 quotient, {loss}": value for loss, value in collapse.items()}
    drawn, axes = plots.panels(2)
    for ax, name, label in zip(
        axes, ("accuracy", "nc1_quotient"), ("test accuracy", "NC1 quotient"), strict=True
    ):
        plots.strips(
            ax,
            {loss: [row[name] for row in rows if row["loss"] == loss] for loss in LOSSES},
            label=label,
        )
    return Evidence(numbers, rows, drawn)


ROWS = (
    Claim(
        "zhou2022-losses",
        PAPER,
        "Cross-entropy, squared error, label smoothing and focal loss all have simplex ETFs as "
        "their only minimisers.",
        "smoothing .05, focal gamma 3, wd = 5e-4; networks on images",
        "K = 10, d = 16, n = 5, lambda 5e-4, no bias (squared error: free); lbfgs, and momentum "
        "over all samples",
        tuple(Quantity(f"value, {name}", theory, 1e-9) for name, (_, theory) in LOSSES.items())
        + tuple(
            Quantity(f"nc2_classifier, {name}", 0.0, 1e-7, "absolute", quick_tolerance=2e-2)
            for name in LOSSES
        ),
        _losses,
        seconds=40,
        quick="1,000 momentum steps instead of up to 20,000",
        quick_seconds=8,
    ),
    Claim(
        "zhou2022-saddles",
        PAPER,
        "Every critical point that is no global minimum is a strict saddle.",
        "proved for cross-entropy, smoothing and squared error, locally for the focal loss; no "
        "eigenvalue given",
        "K = 10, d = 16, n = 5, lambda 5e-4, no bias; the eigenvalue mu - |G| in balanced "
        "variables is ours",
        tuple(Quantity(f"largest deviation, {kind}", 0.0, 1e-8, "absolute") for kind in KINDS),
        _saddles,
        seconds=5,
    ),
    Claim(
        "zhou2022-networks",
        PAPER,
        "Networks trained to collapse with any of the four losses test equally well.",
        "WRN50, CIFAR10 and others, 200 epochs and more",
        "digits, MLP 128-128, 2,000 steps, medians over 3 seeds",
        (
            Quantity("spread of test accuracies", 0.0, 0.03, "absolute"),
            *(Quantity(f"NC1 quotient, {loss}") for loss in LOSSES),
        ),
        _networks,
        seconds=80,
        quick="300 steps, one seed",
        quick_seconds=5,
    ),
)
