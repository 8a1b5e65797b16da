"""What the rows of the metrics table compute from: checked inputs, and the pieces that several
metrics share.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.metrics import geometry, pairwise
from ufm_fast.metrics.checks import (
    check_matrix,
    check_positive,
    check_same_device,
    check_same_dim,
    check_vector,
)
from ufm_fast.metrics.pairwise import Estimate, Sampling
from ufm_fast.metrics.rows import RowMatrix, View
from ufm_fast.metrics.statistics import ClassStatistics


class Inputs:
    """Features, classifier or both, checked; every shared piece is formed once, when a metric first
    asks for it.

    given: which of "features", "weight" and "penalties" there are; a metric is computed when all
    that it needs is given.
    """

    def __init__(
        self,
        features: Any,
        weight: Any,
        labels: Any,
        bias: Any = None,
        *,
        counts: Any = None,
        classes: int | None = None,
        penalties: tuple[float | None, float | None] = (None, None),
        sampling: Sampling | None = None,
    ) -> None:
        _check_together(features, weight, labels, bias, counts, penalties)
        self.sampling = Sampling() if sampling is None else sampling
        self.given: set[str] = set()
        self.bias: Tensor | None = None
        if weight is not None:
            self.given.add("weight")
            self.weight = check_matrix(weight, "weight")
            classes = _class_count(self.weight.shape[0], classes)
            self.bias = (
                None if bias is None else check_vector(bias, "bias", classes, "the rows of weight")
            )
            check_same_device(weight=self.weight, bias=self.bias)
            self.classifier = RowMatrix.of(self.weight)
        if features is not None:
            self.given.add("features")
            self.statistics = ClassStatistics(features, labels, classes, counts)
        if self.given == {"features", "weight"}:
            check_same_dim(self.weight, self.statistics.rows[0])
            check_same_device(weight=self.weight, features=self.statistics.rows[0])
        if penalties[0] is not None and penalties[1] is not None:
            self.given.add("penalties")
            self.lambda_w = check_positive(penalties[0], "lambda_w")
            self.lambda_h = check_positive(penalties[1], "lambda_h")

    @cached_property
    def head(self) -> View:
        """Rows of W for the classes that have samples, to go with the class means."""
        present = self.statistics.present
        return (
            self.classifier
            if present.numel() == self.classifier.count
            else RowMatrix.of(self.weight[present])
        ).raw

    @cached_property
    def classifier_cosines(self) -> tuple[float, float]:
        return geometry.cosine_moments(self.classifier.raw)

    @cached_property
    def mean_cosines(self) -> tuple[float, float]:
        return geometry.cosine_moments(self.statistics.centred_means)

    @cached_property
    def duality(self) -> tuple[float, float]:
        return geometry.self_duality(self.head, self.statistics.sample_centred_means)

    @cached_property
    def balance(self) -> tuple[float, float]:
        features, _, counts = self.statistics.rows
        return geometry.imbalance(self.weight, features, self.lambda_h / self.lambda_w, counts)

    @cached_property
    def nearest(self) -> Estimate:
        return pairwise.nc4(self.statistics, self.classifier.raw, self.bias, self.sampling)

    @cached_property
    def distances(self) -> Estimate:
        return pairwise.cdnv(self.statistics, self.sampling)

    @cached_property
    def classifier_pairs(self) -> tuple[Estimate, float]:
        return pairwise.equiangularity(self.classifier.raw, self.sampling)

    @cached_property
    def mean_pairs(self) -> tuple[Estimate, float]:
        return pairwise.equiangularity(self.statistics.centred_means, self.sampling)


def _class_count(rows: int, classes: int | None) -> int:
    if rows < 2:
        raise InputError(f"weight must have at least 2 rows, one for each class, got {rows}")
    if classes is not None and classes != rows:
        raise InputError(
            f"classes must equal the number of rows of weight, {rows}, got {classes!r}; leave it "
            f"out"
        )
    return rows


def _check_together(
    features: Any, weight: Any, labels: Any, bias: Any, counts: Any, penalties: tuple[Any, Any]
) -> None:
    if features is None and weight is None:
        raise InputError("features and weight are both None; give at least one of them")
    if (features is None) != (labels is None):
        raise InputError("features and labels belong together; give both or neither")
    if counts is not None and features is None:
        raise InputError("counts belong to the rows of features; give features and labels too")
    if bias is not None and weight is None:
        raise InputError("bias belongs to weight; give weight too")
    if (penalties[0] is None) != (penalties[1] is None):
        raise InputError("lambda_w and lambda_h belong together; give both or neither")
