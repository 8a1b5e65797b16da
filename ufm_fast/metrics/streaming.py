"""Class means and covariances of features that come in batches, each seen once and let go.

Chan, Golub and LeVeque's update joins the counts, means and scatters of two sets of rows,

    S = S_a + S_b + n_a n_b/(n_a + n_b) (m_b - m_a)(m_b - m_a)',

and subtracts no squares. Here it runs class by class. A mean that is stored as it stands would
carry a rounding of 1e-16 of its size into every later difference, 1e-10 of a spread that is 1e-6 of
the means; so each class stores how far its mean lies from the first row that came of it, rounded to
float32, from which features near collapse differ exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ufm_fast.arguments import integers, whole
from ufm_fast.errors import InputError
from ufm_fast.metrics.checks import as_tensor, check_matrix, check_same_device
from ufm_fast.metrics.statistics import ClassMoments
from ufm_fast.targets import check_labels


class StreamingStatistics:
    """The numbers of `ClassStatistics` of all features, from batches of them in any sizes and any
    order.

    >>> sums = StreamingStatistics(classes=10)
    >>> for features, labels in batches:
    ...     sums.update(features, labels)
    >>> nc1_quotient(sums.result())

    features: (B, d), any floating dtype; labels: (B,) integers in [0, classes). Sums are float64.
    Memory: one d x d and one K x d matrix in float64, and one K x d in float32. Time: O(N d^2).
    Errors: InputError, InputTypeError for shapes, labels and NaN as `ClassStatistics`; then nothing
    of the batch is counted.
    Source: Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample
    variances, 1982.
    """

    def __init__(self, classes: int) -> None:
        self.classes = whole(classes, "classes", 2)
        self.dim: int | None = None

    @torch.no_grad()
    def update(self, features: Any, labels: Any) -> None:
        """Count a batch."""
        features, labels = (
            check_matrix(features, "features"),
            integers(as_tensor(labels, "labels"), "labels"),
        )
        if labels.shape != features.shape[:1]:
            raise InputError(
                f"labels must have shape ({features.shape[0]},) to match features, got "
                f"{tuple(labels.shape)}"
            )
        check_same_device(features=features, labels=labels)
        labels = check_labels(labels, self.classes)
        if self.dim is None:
            self._allocate(features)
        if features.shape[1] != self.dim:
            raise InputError(
                f"features must have {self.dim} columns as those before, got {features.shape[1]}"
            )
        self._join(features.to(torch.float64), *torch.unique(labels, return_inverse=True))

    def _allocate(self, features: Tensor) -> None:
        self.dim = features.shape[1]
        zeros = features.new_zeros(self.classes, self.dim, dtype=torch.float64)
        self._shift, self._first = zeros, zeros.float()
        self._counts, self._squares = zeros.new_zeros(self.classes), zeros.new_zeros(self.classes)
        self._scatter = zeros.new_zeros(self.dim, self.dim)

    def _join(self, rows: Tensor, present: Tensor, slot: Tensor) -> None:
        """Add a batch with the classes ``present``, its rows' places among them in ``slot``."""
        new = self._counts[present] == 0
        first = torch.full_like(present, len(slot)).scatter_reduce_(
            0, slot, torch.arange(len(slot), device=slot.device), "amin"
        )
        limit = torch.finfo(torch.float32).max
        self._first[present[new]] = rows[first[new]].clamp(-limit, limit).float()
        rows = rows - self._first[present[slot]].double()
        number = torch.bincount(slot).to(torch.float64)
        mean = torch.zeros(len(present), rows.shape[1], dtype=torch.float64, device=rows.device)
        mean.index_add_(0, slot, rows).div_(number[:, None])
        rows -= mean[slot]
        before = self._counts[present]
        step = mean - self._shift[present]
        between = (before * number / (before + number)).sqrt()[:, None] * step
        self._scatter.addmm_(rows.T, rows).addmm_(between.T, between)
        squares = between.square().sum(1).index_add_(0, slot, rows.square().sum(1))
        self._squares[present] += squares
        self._shift[present] += step * (number / (before + number))[:, None]
        self._counts[present] += number

    @torch.no_grad()
    def result(self) -> ClassMoments:
        """The statistics so far. Errors: InputError where fewer than two classes have samples."""
        return _Streamed(self)


class _Streamed(ClassMoments):
    def __init__(self, sums: StreamingStatistics) -> None:
        present = torch.empty(0) if sums.dim is None else sums._counts.nonzero()[:, 0]
        if sums.dim is None or len(present) < 2:
            raise InputError(
                f"labels must name at least 2 classes with samples, got {len(present)}"
            )
        self.present, self.classes, self.dim = present, len(present), sums.dim
        self.class_counts = sums._counts[present]
        self.samples = float(self.class_counts.sum())
        self.variances = sums._squares[present] / self.class_counts
        values, vectors = torch.linalg.eigh(sums._scatter)
        self.within_factor = values.clamp_min(0).sqrt()[:, None] * vectors.T
        self._place(sums._first[present].double(), sums._shift[present])
