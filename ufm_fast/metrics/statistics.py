"""Class means and covariances of features, accumulated from centred rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ufm_fast.arguments import integers, whole
from ufm_fast.errors import InputError
from ufm_fast.metrics.checks import as_tensor, check_counts, check_matrix, check_same_device
from ufm_fast.metrics.rows import RowMatrix, View, block_rows, triangular_factor
from ufm_fast.targets import check_labels

Centre = Literal["samples", "classes"]


class ClassMoments:
    """What follows from the class means and the scatter about them, however they were summed.

    present: (K,) the labels that occur, ascending; every per-class array follows this order.
    class_counts: (K,) samples of each. samples: N. variances: (K,) mean |h_i - mu_k|^2 over the
    class. means: the class means about `origin`.
    within_factor: R with R'R = N Sigma_W.
    """

    present: Tensor
    dim: int
    classes: int
    samples: float
    class_counts: Tensor
    variances: Tensor
    within_factor: Tensor
    origin: Tensor
    class_centre: Tensor
    offset: Tensor
    means: RowMatrix

    def _place(self, value: Tensor, residual: Tensor) -> None:
        """Set means and centres from class means in two parts, value + residual; `value` is used
        up.
        """
        self.origin = value.mean(0)
        self.means = RowMatrix.of(value.sub_(self.origin).add_(residual))
        self.class_centre = self.origin + self.means.mean
        self.offset = self._weighted_centre()

    def _weighted_centre(self) -> Tensor:
        """Sample mean minus mean of class means, (d,); exact to the spread of the means, and zero
        for equal counts.
        """
        if bool((self.class_counts == self.class_counts[0]).all()):
            return torch.zeros_like(self.origin)
        total = torch.zeros_like(self.origin)
        start = 0
        for block in self.means.centred():
            total += self.class_counts[start : start + block.shape[0]] @ block
            start += block.shape[0]
        return total / self.samples

    @property
    def sample_centre(self) -> Tensor:
        """mu_G as the mean over samples, (d,)."""
        return self.class_centre + self.offset

    @property
    def class_means(self) -> Tensor:
        """mu_k, (K, d) float64."""
        return self.raw_means.take(slice(None))

    @cached_property
    def raw_means(self) -> View:
        """The class means as they stand."""
        return View(self.means, self.class_centre)

    @cached_property
    def centred_means(self) -> View:
        """mu_k - mu_G about the mean of class means."""
        return self.means.about_mean

    @cached_property
    def sample_centred_means(self) -> View:
        """mu_k - mu_G about the sample mean."""
        return View(self.means, -self.offset) if bool(self.offset.any()) else self.centred_means

    def means_about(self, centre: Centre) -> View:
        """mu_k - mu_G about the centre of that name."""
        return self.sample_centred_means if centre == "samples" else self.centred_means

    @property
    def within(self) -> Tensor:
        """Sigma_W, (d, d)."""
        return self.within_factor.T @ self.within_factor / self.samples

    def between(self, centre: Centre = "samples") -> Tensor:
        """Sigma_B, (d, d), about the centre of that name."""
        factor = self.means_about(centre).factor
        return factor.T @ factor / self.classes

    def about_classes(self, rows: Tensor) -> Tensor:
        """Rows minus the mean of class means, without losing digits when that mean is large."""
        shifted: Tensor = rows.to(torch.float64) - self.origin
        return shifted - self.means.mean


class ClassStatistics(ClassMoments):
    """Class means, global means, within- and between-class covariance of features H (N x d) with
    labels y.

    mu_k = mean of the rows of class k;  mu_G = sample mean, or mean of the class means
    (centre="samples" or "classes") Sigma_W = (1/N) sum_i (h_i - mu_{y_i})(h_i - mu_{y_i})'
    Sigma_B = (1/K) sum_k (mu_k - mu_G)(mu_k - mu_G)'

    features: (N, d), any floating dtype; sums are float64. labels: (N,), integers in [0, classes).
    classes: the number of classes, by default the largest label plus one. counts: (N,), row r
    stands for counts[r] equal samples (as in a solution reduced to class means; need not be whole),
    and then N above is their sum. Classes without samples have no mean: they are left out, and K
    above is the number of classes that have one.
    Memory: the input; two (K, d) float64 arrays while the means are formed, one after; and four
    float64 blocks of max(2 d, 2^19 / d) rows or, where they are fewer, of all rows. Time: O((N + K)
    d^2).

    present: (K,) the labels that occur, ascending; every per-class array follows this order.
    class_counts: (K,) samples of each. samples: N. variances: (K,) mean |h_i - mu_k|^2 over the
    class. means: the class means about `origin`.
    Errors: InputError, InputTypeError for wrong shapes, dtypes, devices, labels out of range, NaN,
    or fewer than two classes with samples. Source: Papyan, Han and Donoho, arXiv 2008.08186; Zhu et
    al., arXiv 2105.02375.
    """

    @torch.no_grad()
    def __init__(
        self, features: Any, labels: Any, classes: int | None = None, counts: Any = None
    ) -> None:
        features, labels, counts = _checked(features, labels, classes, counts)
        if bool((counts == 0).any()):
            kept = counts > 0
            features, labels, counts = features[kept], labels[kept], counts[kept]
        self.present, self._slot = torch.unique(labels, return_inverse=True)
        self.classes = self.present.numel()
        if self.classes < 2:
            raise InputError(
                f"labels must name at least 2 classes with samples, got {self.classes}"
            )
        self.dim = features.shape[1]
        self.class_counts = counts.new_zeros(self.classes).index_add_(0, self._slot, counts)
        self.samples = float(counts.sum())
        self._features, self._counts = features, counts
        self._accumulate()

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Features in float64, their counts (as a column) and their class slots, a block of rows at
        a time.
        """
        size = block_rows(self.dim)
        columns = (
            self._features.split(size),
            self._counts[:, None].split(size),
            self._slot.split(size),
        )
        return (
            (rows.to(torch.float64), counts, slot)
            for rows, counts, slot in zip(*columns, strict=True)
        )

    def _accumulate(self) -> None:
        """Means in two parts (value + rounding residual), then the scatter about them; no squares
        are subtracted.
        """
        if (
            self.classes == self._slot.numel()
        ):  # one row a class: it is its own mean, and nothing scatters
            value = self._features[torch.argsort(self._slot)].to(torch.float64)
            residual = torch.zeros_like(value[:1])
            self.variances = torch.zeros_like(self.class_counts)
            self.within_factor = value.new_zeros(0, self.dim)
        else:
            value = self._class_mean(None)
            residual = self._class_mean(value)
            self.variances = torch.zeros_like(self.class_counts)
            self.within_factor = triangular_factor(self._deviations(value, residual), value)
            self.variances /= self.class_counts
        self._place(value, residual)

    def _class_mean(self, about: Tensor | None) -> Tensor:
        total = self.class_counts.new_zeros(self.classes, self.dim)
        for rows, counts, slot in self._blocks():
            total.index_add_(0, slot, counts * (rows if about is None else rows - about[slot]))
        return total.div_(self.class_counts[:, None])

    def _deviations(self, value: Tensor, residual: Tensor) -> Iterator[Tensor]:
        """Rows sqrt(n_i) (h_i - mu_{y_i}); the class variances are summed on the way."""
        for rows, counts, slot in self._blocks():
            deviation = ((rows - value[slot]) - residual[slot]) * counts.sqrt()
            self.variances.index_add_(0, slot, deviation.square().sum(1))
            yield deviation

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The features that were counted, their labels and their counts."""
        return self._features, self.present[self._slot], self._counts


def _checked(
    features: Any, labels: Any, classes: int | None, counts: Any
) -> tuple[Tensor, Tensor, Tensor]:
    features, labels = (
        check_matrix(features, "features"),
        integers(as_tensor(labels, "labels"), "labels"),
    )
    if labels.shape != features.shape[:1]:
        raise InputError(
            f"labels must have shape ({features.shape[0]},) to match features, got "
            f"{tuple(labels.shape)}"
        )
    if counts is None:
        counts = torch.ones(labels.shape, dtype=torch.float64, device=features.device)
    counts = check_counts(counts, features.shape[0])
    check_same_device(features=features, labels=labels, counts=counts)
    classes = max(int(labels.max()) + 1, 1) if classes is None else whole(classes, "classes", 2)
    return features, check_labels(labels, classes), counts
