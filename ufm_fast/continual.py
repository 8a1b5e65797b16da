"""Heads from sums: the least-squares classifier of features that stream by, and rows for classes
that are new.

With features h_i and one-hot targets y_i the head of

    1/2 mean |W h + b - y|^2 + lambda/2 |W|^2 (+ lambda/2 |b|^2)

needs the class counts, the class sums and the second moment of the features, never the features. A
network that was trained with squared error and weight decay lambda has this head already, so with
lambda = the decay old rows stay where they are, and only the rows of new classes change. Source:
Harun and Kanan, arXiv 2503.06385, eq. 3 (balanced, no bias); Han, Papyan and Donoho, arXiv
2106.02073 (penalised bias).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ufm_fast.arguments import integers, number, whole
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.metrics.checks import as_tensor, check_matrix, check_same_device
from ufm_fast.targets import check_labels

BIASES = ("none", "penalised", "free")
METHODS = ("least-squares", "class-mean", "random")
#: A pivot of the second moment below this part of the largest is rounding.
_SINGULAR = 1e-13


class StreamingSums:
    """Counts n_k, class sums sum_{i in k} h_i and the second moment sum_i h_i h_i' of features that
    come in batches.

    counts (K,), sums (K, d), moment (d, d): float64, whatever the features' dtype. N appears
    nowhere in memory.
    Errors: InputError, InputTypeError for shapes, labels and NaN; then nothing of the batch is
    counted.
    """

    def __init__(self, classes: int, dim: int, device: torch.device | str = "cpu") -> None:
        self.classes, self.dim = whole(classes, "classes", 1), whole(dim, "dim", 1)
        numbers: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.counts = torch.zeros(self.classes, **numbers)
        self.sums = torch.zeros(self.classes, self.dim, **numbers)
        self.moment = torch.zeros(self.dim, self.dim, **numbers)

    @torch.no_grad()
    def update(self, features: Any, labels: Any) -> StreamingSums:
        """Count a batch: features (B, d), labels (B,) in [0, K)."""
        features, labels = (
            check_matrix(features, "features"),
            integers(as_tensor(labels, "labels"), "labels"),
        )
        if features.shape[1] != self.dim:
            raise InputError(f"features must have {self.dim} columns, got {features.shape[1]}")
        if labels.shape != features.shape[:1]:
            raise InputError(
                f"labels must have shape ({features.shape[0]},) to match features, got "
                f"{tuple(labels.shape)}"
            )
        check_same_device(features=features, labels=labels, sums=self.sums)
        labels, rows = check_labels(labels, self.classes), features.to(torch.float64)
        self.counts += torch.bincount(labels, minlength=self.classes)
        self.sums.index_add_(0, labels, rows)
        self.moment.addmm_(rows.T, rows)
        return self

    def merge(self, other: StreamingSums) -> StreamingSums:
        """Count what another has counted. Errors: InputError where classes or dimensions differ."""
        if (self.classes, self.dim) != (other.classes, other.dim):
            raise InputError(
                f"sums of {self.classes} classes in {self.dim} dimensions can't take those of "
                f"{other.classes} in {other.dim}"
            )
        self.counts += other.counts
        self.sums += other.sums
        self.moment += other.moment
        return self

    @property
    def means(self) -> Tensor:
        """Class means (K, d). Errors: InputError naming the classes without samples."""
        empty = (self.counts == 0).nonzero()[:, 0].tolist()
        if empty:
            raise InputError(
                f"classes {', '.join(map(str, empty[:5]))} have no samples; update the sums with "
                f"some first"
            )
        return self.sums / self.counts[:, None]


@torch.no_grad()
def least_squares_head(
    sums: StreamingSums, lam: float, bias: str = "none"
) -> tuple[Tensor, Tensor | None]:
    """The minimiser (W, b) of 1/2 mean |W h + b - y|^2 + lam/2 |W|^2, float64, for any class
    counts.

    With p_k = n_k/N, mu = mean h, C = (1/N) sum_i y_i h_i' and M = (1/N) sum_i h_i h_i':

        none       W = C (M + lam I)^-1
        penalised  + lam/2 |b|^2:  W = (C - c p mu')(M - c mu mu' + lam I)^-1,  b = c (p - W mu),
                   c = 1/(1 + lam)
        free       W = (C - p mu')(M - mu mu' + lam I)^-1,  b = p - W mu

    Errors: InputError for classes without samples, lam < 0, lam = 0 where the second moment is
    singular, an unknown bias. Equivalent, with all features at hand: ``torch.linalg.lstsq`` of the
    features stacked on sqrt(N lam) I.
    """
    if bias not in BIASES:
        raise InputError(f"bias must be one of {', '.join(BIASES)}; got {bias!r}")
    if number(lam, "lam") < 0:
        raise InputError(f"lam must be >= 0, got {lam}")
    means = sums.means
    total = sums.counts.sum()
    share, centre = sums.counts / total, sums.sums.sum(0) / total
    pull = {"none": 0.0, "penalised": 1 / (1 + lam), "free": 1.0}[bias]
    # p_k (mu_k - c mu), formed from means, keeps the digits of classes near the centre.
    right = share[:, None] * (means - pull * centre)
    matrix = sums.moment / total - pull * torch.outer(centre, centre)
    matrix.diagonal().add_(lam)
    W = _solve(matrix, right, lam)
    return W, None if bias == "none" else pull * (share - W @ centre)


def _solve(matrix: Tensor, right: Tensor, lam: float) -> Tensor:
    """right matrix^-1 for a symmetric positive definite matrix, by its Cholesky factor."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    if int(failed) or bool(pivots.min() <= _SINGULAR * matrix.diagonal().max()):
        raise InputError(
            f"lam = {lam} leaves the features' second moment singular; choose a larger lam"
        )
    return torch.cholesky_solve(right.T, factor).T


@torch.no_grad()
def init_rows_(
    linear: nn.Linear,
    sums: StreamingSums,
    classes: Iterable[int],
    method: str = "least-squares",
    *,
    lam: float | None = None,
    keep_old: bool = False,
    seed: int = 0,
) -> nn.Linear:
    """Write the rows of new classes into a head, in place, and return it.

    least-squares: the head of ``least_squares_head`` with the penalty ``lam`` (on the bias too, if
    the layer has one): all of its rows, or with keep_old those of ``classes`` only. lam is
    required; the head's weight decay is the choice that leaves trained old rows where they are,
    since a trained squared-error head is its own least-squares head. class-mean: the class means of
    ``sums`` (update them with features of length one for the variant of the authors' comparison),
    zero biases. random: as torch makes a new layer, from ``seed``.

    >>> init_rows_(model.head, sums, range(5, 10), lam=5e-4)

    Errors: InputError for sums that do not fit the layer, classes out of range or without samples,
    an unknown method.
    """
    if not isinstance(linear, nn.Linear):
        raise InputTypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if (sums.classes, sums.dim) != tuple(linear.weight.shape):
        raise InputError(
            f"sums are of {(sums.classes, sums.dim)} classes and dimensions, linear of "
            f"{tuple(linear.weight.shape)}"
        )
    rows = check_labels(
        integers(list(classes), "classes"), sums.classes, "classes", "make the layer wider"
    ).to(linear.weight.device)
    W, b = _new_rows(linear, sums, method, lam, seed)
    if method == "least-squares" and not keep_old:
        rows = torch.arange(sums.classes, device=rows.device)
    linear.weight[rows] = W.to(linear.weight)[rows]
    if linear.bias is not None:
        linear.bias[rows] = (
            torch.zeros_like(linear.bias)[rows] if b is None else b.to(linear.bias)[rows]
        )
    return linear


def _new_rows(
    linear: nn.Linear, sums: StreamingSums, method: str, lam: float | None, seed: int
) -> tuple[Tensor, Tensor | None]:
    if method == "least-squares":
        if lam is None:
            raise InputError(
                "method least-squares needs lam; the weight decay of the head is the natural choice"
            )
        return least_squares_head(sums, lam, "none" if linear.bias is None else "penalised")
    if method == "class-mean":
        return sums.means, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(whole(seed, "seed", 0, 2**63 - 1))
        fresh = nn.Linear(sums.dim, sums.classes, bias=linear.bias is not None)
    return fresh.weight.detach(), None if fresh.bias is None else fresh.bias.detach()
