"""Minimisers as points: classifier and class means built from the spectrum of their logits.

With balanced variables A (a row per class mean) and B (K x d), the class means are
(lambda_W/lambda_H)^(1/4) A_k/sqrt(n_k), the classifier is (lambda_H/lambda_W)^(1/4) B, and a
minimiser has B A' = the weighted logits with A'A = B'B: a singular value decomposition L
diag(sigma) R' gives B = L sqrt(sigma), A = R sqrt(sigma). Nothing here is K x K unless d >= K-1,
and nothing costs more than O(K d^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = tuple[Tensor, Tensor, Tensor | None]
"""W (K x d), class means or set features (a row each), b (K,) or None; float64 on the CPU."""


def simplex_frame(classes: int, dim: int) -> Tensor:
    """K x d, with min(d, K-1) orthonormal columns that sum to zero, and zero columns after them.

    For d >= K-1 the rows are a simplex equiangular tight frame: U U' = I - J/K.
    """
    return simplex_rows(classes, dim, torch.arange(classes))


def simplex_rows(classes: int, dim: int, rows: Tensor) -> Tensor:
    """Those rows of the frame."""
    columns = min(dim, classes - 1)
    frame = torch.zeros(len(rows), dim, dtype=torch.float64)
    if columns == 0:
        return frame
    # The reflection that carries the last axis to 1/sqrt(K): its other columns span the complement
    # of 1.
    mirror = torch.full((len(rows),), -1 / math.sqrt(classes), dtype=torch.float64)
    mirror[rows == classes - 1] += 1
    frame[:, :columns] = (mirror / (math.sqrt(classes) - 1))[:, None]
    own = torch.nonzero(rows < columns)[:, 0]
    frame[own, rows[own]] += 1
    return frame


def scales(lambda_w: float, lambda_h: float) -> tuple[float, float]:
    """Factors from balanced variables to (classifier, features)."""
    ratio = lambda_h**0.25 / lambda_w**0.25
    return ratio, 1 / ratio


def class_means(balanced: Tensor, counts: Tensor) -> Tensor:
    """Rows divided by sqrt(n_k); zero where a class is empty."""
    roots = counts.to(torch.float64).sqrt()
    return torch.where(roots > 0, 1 / roots, 0.0)[:, None] * balanced


class Logits:
    """A spectrum of logits that a minimiser can be built from. ``by_class``: some classes' rows can
    be built alone.
    """

    by_class = False

    def point(self) -> Parameters:
        """W, class means (or features of target sets), b."""
        raise NotImplementedError

    def rows(self, classes: Tensor) -> Parameters:
        """The same of some classes alone, in any order."""
        raise NotImplementedError

    def hidden(self) -> tuple[Tensor, ...]:
        """The hidden layers W_1 .. W_(M-1); none of one layer."""
        return ()


class LogitsOfClasses(Logits):
    """Logits whose minimiser is built class by class."""

    by_class = True
    counts: Tensor

    def point(self) -> Parameters:
        return self.rows(torch.arange(len(self.counts)))


@dataclass(frozen=True, eq=False)
class GroupedLogits(LogitsOfClasses):
    """Weighted logits of classes that come in groups of equal counts (G groups, in ascending order
    of count).

    `within`: the singular value of each group's zero-sum vectors; `shared`: r more singular values,
    whose vectors `left` and `right` (G x r) are coefficients on the groups' unit vectors; `bias`:
    one number a group, or None.
    """

    dim: int
    counts: Tensor
    within: Sequence[float]
    shared: Sequence[float]
    left: Tensor
    right: Tensor
    bias: Sequence[float] | None
    lambda_w: float
    lambda_h: float

    def rows(self, classes: Tensor) -> Parameters:
        _, group, sizes = torch.unique(self.counts, return_inverse=True, return_counts=True)
        order = torch.argsort(group, stable=True)
        place = torch.empty_like(order)  # of each class in its group
        place[order] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[group[order]]
        group, place = group[classes], place[classes]
        B = torch.zeros(len(classes), self.dim, dtype=torch.float64)
        used = 0
        here = torch.bincount(group, minlength=len(sizes)).tolist()
        members = torch.split(torch.argsort(group, stable=True), here)
        for rows, size, sigma in zip(members, sizes.tolist(), self.within, strict=True):
            width = min(size - 1, self.dim - used)
            if sigma > 0 and width > 0:
                frame = simplex_rows(size, width, place[rows])
                B[rows, used : used + width] = math.sqrt(sigma) * frame
                used += width
        A = B.clone()
        strength = torch.as_tensor(self.shared, dtype=torch.float64).clamp(min=0).sqrt()
        unit = sizes.to(torch.float64).rsqrt()[:, None] * strength
        for matrix, vectors in ((B, self.left), (A, self.right)):
            matrix[:, used : used + len(strength)] = (vectors * unit)[group]
        bias = None if self.bias is None else torch.as_tensor(self.bias, dtype=torch.float64)[group]
        to_classifier, to_features = scales(self.lambda_w, self.lambda_h)
        return to_classifier * B, to_features * class_means(A, self.counts[classes]), bias


@dataclass(frozen=True, eq=False)
class OrthogonalFrame(LogitsOfClasses):
    """Weighted logits `sigma[j]` at the classes `kept[j]` and zero elsewhere: an axis for each
    class that is kept.
    """

    dim: int
    counts: Tensor
    kept: Tensor
    sigma: Tensor
    lambda_w: float
    lambda_h: float

    def rows(self, classes: Tensor) -> Parameters:
        axis = torch.full((len(self.counts),), -1)  # of each class
        axis[self.kept] = torch.arange(len(self.kept))
        axis = axis[classes]
        kept = torch.nonzero(axis >= 0)[:, 0]
        B = torch.zeros(len(classes), self.dim, dtype=torch.float64)
        B[kept, axis[kept]] = self.sigma[axis[kept]].sqrt()
        to_classifier, to_features = scales(self.lambda_w, self.lambda_h)
        return to_classifier * B, to_features * class_means(B, self.counts[classes]), None


@dataclass(frozen=True, eq=False)
class TagAverages(Logits):
    """Logits slopes[m] (1_S - m/K) of a label set S of size m, in compressed rows; `sigma`: their
    singular value.
    """

    classes: int
    dim: int
    indptr: Tensor
    indices: Tensor
    slopes: Mapping[int, float]
    sigma: float
    with_bias: bool
    lambda_w: float
    lambda_h: float

    def point(self) -> Parameters:
        frame = simplex_frame(self.classes, self.dim)
        sizes = self.indptr.diff()
        features = torch.zeros(len(sizes), self.dim, dtype=torch.float64)
        rows = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        features.index_add_(0, rows, frame[self.indices.long()])
        slope = torch.tensor([self.slopes[int(m)] for m in sizes], dtype=torch.float64)
        features *= (slope / math.sqrt(self.sigma) if self.sigma > 0 else 0 * slope)[:, None]
        bias = torch.zeros(self.classes, dtype=torch.float64) if self.with_bias else None
        to_classifier, to_features = scales(self.lambda_w, self.lambda_h)
        return to_classifier * math.sqrt(self.sigma) * frame, to_features * features, bias


@dataclass(frozen=True, eq=False)
class RowsOfClasses(Logits):
    """A row of features for each target set of one label, taken from the class means of
    `logits`.
    """

    logits: Logits
    classes: Tensor

    def point(self) -> Parameters:
        classifier, means, bias = self.logits.point()
        return classifier, means[self.classes], bias


@dataclass(frozen=True, eq=False)
class UnitSimplex(Logits):
    """W a simplex of unit rows; each class mean along its row, tilted out of their span until the
    logit gap is ``gap``.
    """

    classes: int
    dim: int
    temperature: float
    gap: float

    by_class = True

    def point(self) -> Parameters:
        """(W, class means, None)."""
        return self.rows(torch.arange(self.classes))

    def rows(self, classes: Tensor) -> Parameters:
        K = self.classes
        W = simplex_rows(K, self.dim, classes) * math.sqrt(K / (K - 1))
        along = min(self.gap * (K - 1) / (self.temperature * K), 1.0)
        H = along * W
        if along < 1.0:  # the frame's last column is free: d >= K
            H[:, K - 1] = math.sqrt(1.0 - along * along)
        return W, H, None
