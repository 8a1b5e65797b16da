"""Model against network: a network's last two layers W_2 relu(W_1 h) beside the extended model with the same decay.

Both have squared error, no bias in these layers, and lambda/2 on W_1 and W_2. The only number that the model lacks is lambda_H,
the penalty on the features h. Two matchings give it:

    balance   lambda_H = lambda |W_1|^2/|H|^2, which every critical point of the model has;
    gap       the lambda_H at which the model's minimum has the network's mean logit gap.

What the model then predicts is the minimum of `theory.deep.layered_mse` with three factors; its orthogonal frames are not
negative, so a ReLU between changes nothing. Source: arXiv 2202.08087, last experiment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ufm_fast.errors import InputError
from ufm_fast.metrics import ClassStatistics, RowMatrix, nc1_pinv, nc1_quotient, nc2, nc3_papyan
from ufm_fast.networks.train import BLOCK, Training
from ufm_fast.theory.deep import layered_mse

FACTORS = 3


@dataclass(frozen=True)
class Tail:
    """The last two layers over a training set: W_2 (K x d_1), W_1 (d_1 x d_0), and h, a row a sample or one a class.

    labels: (R,) of the rows of h; counts: (K,) samples of each class, N in all.
    """

    W2: Tensor
    W1: Tensor
    h: Tensor
    labels: Tensor
    counts: Tensor

    def numbers(self) -> dict[str, float]:
        """What model and network are compared by. Logits and spectra are those of the class means."""
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
            "W_2 W_1, last / first singular value": float(product[-1] / product[0]),
            "W_2 W_1, first singular value": float(product[0]),
            "means, last / first singular value": float(spread[-1] / spread[0]),
        }

    def collapse(self) -> dict[str, float]:
        """NC1 and its quotient, NC2 and NC3 to the frame (nothing centred), of h as layer 1 and of relu(W_1 h) as layer 2.

        NC3 compares class means with the rows that read them: W_2 W_1 of h, W_2 behind it.
        """
        found: dict[str, float] = {}
        layers = ((self.h, self.W2 @ self.W1), ((self.h @ self.W1.T).clamp_min(0.0), self.W2))
        for number, (features, reader) in enumerate(layers, 1):
            moments = ClassStatistics(features, self.labels, len(self.counts))
            found[f"nc1_pinv, layer {number}"] = nc1_pinv(moments)
            found[f"nc1_quotient, layer {number}"] = nc1_quotient(moments)
            found[f"nc2_means_frame, layer {number}"] = nc2(moments.raw_means, frame=True)
            found[f"nc3, layer {number}"] = nc3_papyan(RowMatrix.of(reader).raw, moments.raw_means)
        return found

    def _means(self, rows: Tensor) -> Tensor:
        total = rows.new_zeros(len(self.counts), rows.shape[1]).index_add_(0, self.labels, rows)
        return total / torch.bincount(self.labels, minlength=len(self.counts))[:, None]


@torch.no_grad()
def tail_of(training: Training) -> Tail:
    """The tail of a trained MLP, float64. Errors: InputError unless its last two layers have no bias and no unit features."""
    network, examples = training.network, training.data.train
    kind = network.architecture
    if kind.unbiased < 2 or kind.normalised is not None or kind.head != "learned" or training.data.multi_label:
        raise InputError("the overlay needs two last layers without bias (unbiased=2), plain features and one label a sample")
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
    """lambda_H at which the balanced minimum has the network's mean gap g between diagonal and off-diagonal logits.

    With t = g/(1 - g) = x^2: x/(x^2 + 1)^2 = beta, and beta = sqrt(lambda^2 lambda_H N^3)/n for n = N/K samples a class.
    Errors: InputError for a gap outside (1/2, 1), which no minimum has.
    """
    numbers = tail.numbers()
    gap = numbers["diagonal"] - numbers["mean off-diagonal"]
    if not 0.5 < gap < 1:
        raise InputError(f"a mean logit gap of {gap:.4g} is none of the model's, which lie in (1/2, 1); train longer")
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


def compare(tail: Tail, decay: float) -> Iterator[dict[str, float | str]]:
    """A row for each number: measured, predicted by either matching, and the ratios measured / predicted."""
    measured = tail.numbers()
    by_balance = predicted(tail, decay, balanced_penalty(tail, decay)).numbers()
    by_gap = predicted(tail, decay, penalty_at_gap(tail, decay)).numbers()
    for name, value in measured.items():
        row: dict[str, float | str] = {"quantity": name, "measured": value}
        for matching, other in (("balance", by_balance[name]), ("gap", by_gap[name])):
            row[matching] = other
            row[f"ratio, {matching}"] = value / other if abs(other) > 1e-12 else float("nan")
        yield row
