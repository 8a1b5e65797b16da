"""Metrics of a point on several ranks: NC1 to NC3, spectra and balance, from d x d sums over the
ranks.

A rank has its block of W, and the means of the same classes, summed from the ranks that hold their
rows (`exchange`). No rank has all of W or of the means, but where K <= d + 1: then they are no more
numbers than those sums, and formulas that go entry by entry want them whole. Of the table's rows
those are computed that need nothing else (`SUMS`); what compares pairs of classes, or samples with
all classes, is measured in one process from the saved run. A point of few numbers the first rank
measures as a whole (`measure.GATHERED`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.backends.exchange import Exchange
from ufm_fast.backends.gram import gram, row_blocks
from ufm_fast.layout import Axis, Layout, gathered
from ufm_fast.metrics.catalogue import METRICS
from ufm_fast.metrics.inputs import Inputs
from ufm_fast.metrics.rows import RowMatrix, View, block_rows, triangular_factor
from ufm_fast.metrics.statistics import ClassMoments
from ufm_fast.targets import Rows

_WHAT = "metrics"  # in the counts of bytes that are sent
_OfRows = Callable[[slice], Tensor]  # a row for each of a block of rows
_SPECTRA = ("effective_rank", "participation_ratio", "stable_rank")
#: The metrics that sums of d x d matrices are enough for.
SUMS = frozenset(
    {
        *("nc1_pinv", "nc1_trace", "nc1_quotient"),
        *(name for name in METRICS if name.startswith("nc2_")),
        *("nc3", "nc3_centred", "nc3_uncentred", "nc3_frame"),
        *(f"{name}_{of}" for name in _SPECTRA for of in ("classifier", "means")),
        *("balancedness", "balancedness_relative"),
    }
)


def spread_metrics(
    features: Tensor,
    weight: Tensor,
    rows: Rows,
    class_counts: Tensor,
    layout: Layout,
    penalties: tuple[float, float] | None,
) -> dict[str, float]:
    """The metrics of `SUMS` that ``collect`` has, the same on every rank.

    features (R x d), ``rows`` (their targets and counts) and weight: this rank's blocks.
    class_counts: (K,) samples of each class. penalties: lambda_w and lambda_h. Where the rows have
    several targets each, or one class has all, the metrics are the classifier's own.
    """
    inputs = SpreadInputs(
        features, weight, rows, class_counts.to(weight.device).double(), layout, penalties
    )
    names = [
        name for name, metric in METRICS.items() if name in SUMS and metric.needs <= inputs.given
    ]
    values = [float(METRICS[name].compute(inputs)) for name in names]  # type: ignore[arg-type]
    found = torch.tensor(values, dtype=torch.float64)
    return dict(zip(names, layout.mesh.shared(found.to(weight.device)).tolist(), strict=True))


def matrix(world: Axis, rows: Tensor, count: int) -> RowMatrix:
    """The matrix of ``count`` rows of which these are here: spread, or whole where it is small."""
    if count <= rows.shape[1] + 1:
        return RowMatrix.of(torch.cat(gathered(world, rows, _WHAT)))
    return SpreadMatrix(world, rows, count)


class SpreadMatrix(RowMatrix):
    """A matrix of which a rank has ``rows``: ``centred`` gives those, and mean, Gram matrix and
    factor are of all.
    """

    def __init__(self, world: Axis, rows: Tensor, count: int) -> None:
        self.world, self.here, self.read = (
            world,
            rows.shape[0],
            lambda index: rows[index].to(torch.float64),
        )
        self.count, self.dim = count, rows.shape[1]
        self._inner: dict[RowMatrix, Tensor] = {}
        self._base = self._residual = rows.new_zeros(self.dim, dtype=torch.float64)
        self._base = self._average()
        self._residual = self._average()
        self.mean = self._base + self._residual

    def _average(self) -> Tensor:
        total = torch.zeros_like(self._base)
        for block in self.centred():
            total += block.sum(0)
        return self.world.sum_(total, _WHAT) / self.count

    def centred(self) -> Iterator[Tensor]:
        size = block_rows(self.dim)
        return (self.take(slice(start, start + size)) for start in range(0, self.here, size))

    @cached_property
    def factor(self) -> Tensor:
        return of_ranks(self.world, triangular_factor(self.centred(), self.mean))

    @cached_property
    def gram(self) -> Tensor:
        total = self.mean.new_zeros(self.dim, self.dim)
        for block in self.centred():
            total.addmm_(block.T, block)
        return self.world.sum_(total, _WHAT)

    def inner(self, other: RowMatrix) -> Tensor:
        if other not in self._inner:
            self._inner[other] = self.world.sum_(super().inner(other), _WHAT)
        return self._inner[other]


def of_ranks(world: Axis, factor: Tensor) -> Tensor:
    """The triangular factor of all rows from that of the rows here."""
    return triangular_factor(iter(gathered(world, factor, _WHAT)), factor)


class SpreadMoments(ClassMoments):
    """Class means and the scatter about them, from rows with one target each. ``kept``: which
    classes here have rows.
    """

    def __init__(self, features: Tensor, rows: Rows, class_counts: Tensor, layout: Layout) -> None:
        targets, counts = rows.targets.to(features.device), rows.counts.to(class_counts)
        self._features, self._counts, self._layout = features, counts, layout
        self._exchange, world = Exchange(targets, layout), layout.mesh.world
        self._weight = counts / class_counts[targets.indices]
        own = class_counts[layout.class_part]
        self.kept, occupied = own > 0, class_counts[class_counts > 0]
        self.dim, self.classes, self.samples = (
            features.shape[1],
            occupied.numel(),
            float(class_counts.sum()),
        )
        value = self._class_mean(None)
        about = self._exchange.rows(value)
        residual = self._class_mean(about)
        self.within_factor = of_ranks(
            world, triangular_factor(self._deviations(about, residual), value)
        )
        value, residual, own = value[self.kept], residual[self.kept], own[self.kept]
        self.origin = world.sum_(value.sum(0), _WHAT) / self.classes
        placed = value - self.origin + residual
        self.means = matrix(world, placed, self.classes)
        self.class_centre = self.origin + self.means.mean
        self.offset = torch.zeros_like(self.origin)
        if bool((occupied != occupied[0]).any()):
            self.offset = world.sum_(own @ (placed - self.means.mean), _WHAT) / self.samples

    def _class_mean(self, about: _OfRows | None) -> Tensor:
        """Means of this rank's classes, of the rows less what ``about`` gives for a block of
        them.
        """
        total = self._weight.new_zeros(
            self._layout.class_part.stop - self._layout.class_part.start, self.dim
        )
        for part in row_blocks(len(self._features)):
            block = self._features[part].double()
            self._exchange.add(
                total, part, block if about is None else block - about(part), self._weight[part]
            )
        self._exchange.settle(total)
        return total

    def _deviations(self, about: _OfRows, residual: Tensor) -> Iterator[Tensor]:
        rest = self._exchange.rows(residual)
        for part in row_blocks(len(self._features)):
            yield ((self._features[part].double() - about(part)) - rest(part)) * self._counts[
                part, None
            ].sqrt()


class SpreadInputs(Inputs):
    """What the rows of the table compute from, of a point on several ranks."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        rows: Rows,
        class_counts: Tensor,
        layout: Layout,
        penalties: tuple[float, float] | None,
    ) -> None:
        self.world, self.weight, self.features, self.counts = (
            layout.mesh.world,
            weight,
            features,
            rows.counts.to(weight.device),
        )
        self.given = {"weight"}
        self.classifier = matrix(self.world, weight, layout.classes)
        if rows.targets.single and int((class_counts > 0).sum()) > 1:
            self.given.add("features")
            self.moments = SpreadMoments(features, rows, class_counts, layout)
            self.statistics = self.moments  # type: ignore[assignment]
        if penalties is not None:
            self.given.add("penalties")
            self.lambda_w, self.lambda_h = penalties

    @cached_property
    def head(self) -> View:
        every = self.moments.classes == self.classifier.count
        return (
            self.classifier
            if every
            else matrix(self.world, self.weight[self.moments.kept], self.moments.classes)
        ).raw

    @cached_property
    def balance(self) -> tuple[float, float]:
        of_weight = self.world.sum_(gram(self.weight), _WHAT)
        of_features = self.world.sum_(gram(self.features, self.counts), _WHAT)
        difference = torch.linalg.matrix_norm(
            of_weight - self.lambda_h / self.lambda_w * of_features
        )
        return float(difference), float(difference / torch.linalg.matrix_norm(of_weight))
