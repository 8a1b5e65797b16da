"""Model against network: a network's last two layers W_2 relu(W_1 h) beside the extended model with
the same decay.

Both have squared error, no bias in these layers, and lambda/2 on W_1 and W_2. The only number that
the model lacks is lambda_H, the penalty on the features h. Two matchings give it:

    balance   lambda_H = lambda |W_1|^2/|H|^2, which every critical point of the model has;
    gap       the lambda_H at which the model's minimum has the network's mean logit gap.

What the model then predicts is the minimum of `theory.deep.layered_mse` with three factors; its
orthogonal frames are not negative, so a ReLU between changes nothing. Source: arXiv 2202.08087,
last experiment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ufm_fast.errors import InputError
from ufm_fast.metrics import ClassStatistics, RowMatrix, nc1_pinv, nc1_quotient, nc2, nc3
from ufm_fast.networks.train import BLOCK, Training
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.solution import StepRecord
from ufm_fast.solving import solve
from ufm_fast.theory.deep import layered_mse

FACTORS = 3
#: Predictions that are smaller are zero but for rounding: no ratio to them is formed.
ROUNDING = 1e-12
Row = dict[str, Any]


@dataclass(frozen=True)
class Tail:
    """The last two layers over a training set: W_2 (K x d_1), W_1 (d_1 x d_0), and h, a row a
    sample or one a class.

    labels: (R,) of the rows of h; counts: (K,) samples of each class, N in all.
    """

    W2: Tensor
    W1: Tensor
    h: Tensor
    labels: Tensor
    counts: Tensor

    def numbers(self) -> dict[str, float]:
        """What model and network are compared by. Logits are of class means; s_1, s_K: first and
        last singular value.
        """
        share = self.counts / self.counts.sum()
        behind = (self.h @ self.W1.T).clamp_min(0.0)
        error = behind @ self.W2.T - nn.functional.one_hot(self.labels, len(self.counts))
        rows = torch.bincount(self.labels, minlength=len(self.counts))
        weight = (share / rows)[self.labels]
        means, of_h = self._means(behind), self._means(self.h)
        logits = means @ self.W2.T
        off = logits - torch.diag(logits.diagonal())
        energy = float((self.h.square().sum(1) * weight).sum() * self.counts.sum())
        product, spread = torch.linalg.svdvals(self.W2 @ self.W1), torch.linalg.svdvals(of_h)
        K = len(self.counts)
        return {
            "data loss": float((0.5 * error.square().sum(1) * weight).sum()),
            "diagonal": float(logits.diagonal().mean()),
            "largest off-diagonal": float(off.abs().max()),
            "mean off-diagonal": float(off.sum() / (K * (K - 1))),
            "|W_2|^2": float(self.W2.square().sum()),
            "|W_1|^2": float(self.W1.square().sum()),
            "|H|^2": energy,
            "|W_2|^2 / |W_1|^2": float(self.W2.square().sum() / self.W1.square().sum()),
            "W_2 W_1, s_K / s_1": float(product[-1] / product[0]),
            "W_2 W_1, s_1": float(product[0]),
            "means, s_K / s_1": float(spread[-1] / spread[0]),
        }

    def collapse(self) -> dict[str, float]:
        """NC1 and its quotient, NC2 and NC3 to the frame (nothing centred), of h as ``layer0`` and
        relu(W_1 h) as ``layer1``.

        NC3 compares class means with the rows that read them: W_2 W_1 of h, W_2 behind it.
        """
        found: dict[str, float] = {}
        layers = ((self.h, self.W2 @ self.W1), ((self.h @ self.W1.T).clamp_min(0.0), self.W2))
        for number, (features, reader) in enumerate(layers):
            moments = ClassStatistics(features, self.labels, len(self.counts))
            found[f"layer{number}/nc1_pinv"] = nc1_pinv(moments)
            found[f"layer{number}/nc1_quotient"] = nc1_quotient(moments)
            found[f"layer{number}/nc2_means_frame"] = nc2(moments.raw_means, frame=True)
            found[f"layer{number}/nc3_frame"] = nc3(
                RowMatrix.of(reader).raw, moments.raw_means, frame=True
            )
        return found

    def spectra(self) -> dict[str, list[float]]:
        """Singular values of W_2 W_1 and of the class means, the K largest."""
        parts = {"W_2 W_1": self.W2 @ self.W1, "means": self._means(self.h)}
        return {
            name: torch.linalg.svdvals(part)[: len(self.counts)].tolist()
            for name, part in parts.items()
        }

    def _means(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(self.counts), rows.shape[1]).index_add_(0, self.labels, rows)
        return total / torch.bincount(self.labels, minlength=len(self.counts))[:, None]


def has_tail(training: Training) -> bool:
    """Whether the last two layers are the model's: no bias, learned, nothing but a ReLU between, no
    unit features, one label a sample.
    """
    kind = training.network.architecture
    return (
        kind.unbiased >= 2
        and isinstance(training.network.body[-2], nn.Linear)
        and kind.normalised is None
        and kind.head == "learned"
        and not training.data.multi_label
    )


@torch.no_grad()
def tail_of(training: Training) -> Tail:
    """The tail of a trained network, float64. Errors: InputError where it ``has_tail`` not."""
    network, examples = training.network, training.data.train
    if not has_tail(training):
        raise InputError(
            "the overlay needs two last layers without bias (unbiased=2) or batch normalisation, "
            "plain features and one label a sample"
        )
    kind = network.architecture
    last = network.get_submodule(f"body.linear{len(kind.widths)}")
    seen: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].double())

    handle = last.register_forward_pre_hook(note)
    try:
        for block in torch.split(torch.arange(len(examples)), BLOCK):
            network(examples.images[block])
    finally:
        handle.remove()
    W1, labels = torch.as_tensor(last.weight).detach().double(), examples.labels
    counts = torch.bincount(labels, minlength=training.data.classes)
    return Tail(network.head.weight.detach().double(), W1, torch.cat(seen), labels, counts)


def balanced_penalty(tail: Tail, decay: float) -> float:
    """lambda_H by balance."""
    found = tail.numbers()
    return decay * found["|W_1|^2"] / found["|H|^2"]


def penalty_at_gap(tail: Tail, decay: float) -> float:
    """lambda_H at which the balanced minimum has the network's mean gap g between diagonal and
    off-diagonal logits.

    With t = g/(1 - g) = x^2: x/(x^2 + 1)^2 = beta, and beta = sqrt(lambda^2 lambda_H N^3)/n for n =
    N/K samples a class.
    Errors: InputError for a gap outside (1/2, 1), which no minimum has.
    """
    numbers = tail.numbers()
    gap = numbers["diagonal"] - numbers["mean off-diagonal"]
    if not 0.5 < gap < 1:
        raise InputError(
            f"a mean logit gap of {gap:.4g} is none of the model's, which lie in (1/2, 1); train "
            f"longer"
        )
    N, K = float(tail.counts.sum()), len(tail.counts)
    x = (gap / (1 - gap)) ** 0.5
    beta = x / (x * x + 1) ** 2
    return float((beta * N / K) ** 2 / (decay**2 * N**3))


def predicted(tail: Tail, decay: float, lambda_h: float) -> Tail:
    """The model's minimum with these counts and widths, a row of h for each class."""
    (width, dim), K = tail.W1.shape, len(tail.counts)
    penalties = [decay, lambda_h, decay]
    mu = (decay * decay * lambda_h) ** (1 / FACTORS)
    minimum = layered_mse(tail.counts, min(width, dim), mu, FACTORS)
    W2, means, W1 = minimum.factors(tail.counts, [dim, width], penalties)
    return Tail(W2, W1, means, torch.arange(K), tail.counts)


def compare(tails: Sequence[Tail], decay: float) -> list[Row]:
    """A row for each number, medians over networks of several seeds: measured, predicted by either
    matching, the ratios.

    Keys: quantity, measured, balance, gap, and "ratio, balance", "ratio, gap" = measured /
    predicted, None where the prediction is zero (NC1 to NC3). The first row is lambda_H, which has
    no measured value. Errors: InputError of ``penalty_at_gap``.
    """
    penalties = {
        "balance": [balanced_penalty(tail, decay) for tail in tails],
        "gap": [penalty_at_gap(t, decay) for t in tails],
    }
    measured = [tail.numbers() | tail.collapse() for tail in tails]
    models = {
        name: [predicted(tail, decay, p) for tail, p in zip(tails, found, strict=True)]
        for name, found in penalties.items()
    }
    predictions = {
        name: [model.numbers() | model.collapse() for model in found]
        for name, found in models.items()
    }
    rows: list[Row] = [
        {
            "quantity": "lambda_H",
            "measured": None,
            **{name: median(found) for name, found in penalties.items()},
        }
    ]
    for quantity in measured[0]:
        row: Row = {
            "quantity": quantity,
            "measured": median([found[quantity] for found in measured]),
        }
        for name, found in predictions.items():
            pairs = [
                (one[quantity], other[quantity]) for one, other in zip(measured, found, strict=True)
            ]
            told = all(abs(other) > ROUNDING for _, other in pairs)
            row[name] = median([other for _, other in pairs])
            row[f"ratio, {name}"] = median([one / other for one, other in pairs]) if told else None
        rows.append(row)
    return rows


def model_run(tail: Tail, decay: float, steps: int) -> list[dict[str, float]]:
    """NC1 to NC3 by step of the extended ReLU model of all samples: momentum from a normal start,
    lambda_H by balance.

    In balanced variables: in raw ones lambda_H is some 1e-6 and the share 1/N of a sample lets
    features move a thousand times slower than the layers.
    """
    problem = Problem(
        loss="mse",
        labels=tail.labels,
        dim=tail.W1.shape[1],
        layers=2,
        activation="relu",
        widths=tail.W1.shape[0],
        lambda_w=decay,
        lambda_hidden=decay,
        lambda_h=balanced_penalty(tail, decay),
    )
    rows: list[dict[str, float]] = []

    def log(record: StepRecord, point: Callable[[], Point]) -> None:
        x = point()
        rows.append(
            {
                "step": record.step,
                **Tail(x.W, x.hidden[0], x.H, tail.labels, tail.counts).collapse(),
            }
        )

    solve(
        problem,
        method="momentum",
        variables="balanced",
        reduce="none",
        start="normal",
        max_steps=steps,
        metrics=False,
        certificate=False,
        on_log=log,
    )
    return rows
