"""Metrics of a point on several ranks: all that cost O((N + K) d^2), from sums over the ranks.

A rank has its block of W, and the means of the same classes, summed from the ranks that hold their
rows (`exchange`). So what compares a row of W with its class's mean is a sum over classes, and what
goes by norms, spectra and Gram matrices needs d x d numbers of each rank. No rank has all of W or
of the means, but where K <= d + 1: then they are no more numbers than those sums, and formulas that
go entry by entry want them whole.

What compares pairs of classes, or samples with all classes (``cost`` "pairwise" in the table: nc4,
equiangularity, max_cosine, cdnv), is measured in one process from the saved run: exact, each block
would go round to every rank, and drawn pairs lie on two ranks each. A point of few numbers the
first rank measures as a whole (`measure.GATHERED`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.backends.exchange import Exchange
from ufm_fast.backends.gram import row_blocks
from ufm_fast.backends.sums import class_totals
from ufm_fast.layout import Axis, Layout, gathered
from ufm_fast.metrics import geometry
from ufm_fast.metrics.catalogue import METRICS
from ufm_fast.metrics.inputs import Inputs
from ufm_fast.metrics.rows import Index, RowMatrix, View, triangular_factor
from ufm_fast.metrics.statistics import ClassMoments
from ufm_fast.targets import Rows

_WHAT = "metrics"  # in the counts of bytes that are sent
_OfRows = Callable[[slice], Tensor]  # a row for each of a block of rows
#: The metrics that are sums over classes and d x d matrices.
SUMS = frozenset(name for name, metric in METRICS.items() if metric.cost == "linear")


def spread_metrics(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    layout: Layout,
    penalties: tuple[float | None, float | None],
) -> dict[str, float]:
    """The metrics of `SUMS` that ``collect`` has, the same on every rank.

    features (R x d), ``rows`` (the target and count of each), weight and bias: this rank's blocks.
    weight None: the class means' own. penalties: lambda_w and lambda_h. Where one class has all
    rows, the metrics are the classifier's own.
    """
    inputs = SpreadInputs(features, weight, bias, rows, layout, penalties)
    names = [
        name for name, metric in METRICS.items() if name in SUMS and metric.needs <= inputs.given
    ]
    values = [float(METRICS[name].compute(inputs)) for name in names]  # type: ignore[arg-type]
    found = torch.tensor(values, dtype=torch.float64)
    return dict(zip(names, layout.mesh.shared(found.to(features.device)).tolist(), strict=True))


def matrix(world: Axis, rows: Tensor, count: int) -> RowMatrix:
    """The matrix of ``count`` rows of which these are here: spread, or whole where it is small."""
    if count <= rows.shape[1] + 1:
        return RowMatrix.of(torch.cat(gathered(world, rows, _WHAT)))
    zero = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    return SpreadMatrix(
        world, lambda index: rows[index].to(torch.float64), rows.shape[0], count, zero
    )


class SpreadMatrix(RowMatrix):
    """A matrix of which a rank reads ``here`` rows: ``centred`` gives those, and mean, Gram matrix
    and factor are of all. zero: (d,) in float64.
    """

    def __init__(
        self, world: Axis, read: Callable[[Index], Tensor], here: int, count: int, zero: Tensor
    ) -> None:
        self.world, self.read, self.here = world, read, here
        self.count, self.dim = count, zero.numel()
        self._inner: dict[RowMatrix, Tensor] = {}
        self._base = self._residual = zero
        self._base = self._average()
        self._residual = self._average()
        self.mean = self._base + self._residual

    def _average(self) -> Tensor:
        total = torch.zeros_like(self._base)
        for block in self.centred():
            total += block.sum(0)
        return self.world.sum_(total, _WHAT) / self.count

    def alike(self, read: Callable[[Index], Tensor]) -> RowMatrix:
        zero = torch.zeros_like(self.mean)
        return SpreadMatrix(self.world, read, self.here, self.count, zero)

    def total(self, x: Tensor) -> Tensor:
        return self.world.sum_(x.clone(), _WHAT)

    def length(self, values: Tensor) -> Tensor:
        return self.total(super().length(values).square()).sqrt()

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.total(values.sum()) / self.count
        return mean, self.total((values - mean).square().sum()) / (self.count - 1)

    @cached_property
    def factor(self) -> Tensor:
        return of_ranks(self.world, triangular_factor(self.centred(), self.mean))

    @cached_property
    def gram(self) -> Tensor:
        return self.world.sum_(super().gram, _WHAT)

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
        weight: Tensor | None,
        bias: Tensor | None,
        rows: Rows,
        layout: Layout,
        penalties: tuple[float | None, float | None],
    ) -> None:
        self.world, self.features = layout.mesh.world, features
        self.counts, self.given = rows.counts.to(features.device), set[str]()
        if weight is not None:
            self.given.add("weight")
            self.weight, self.bias = weight, bias
            self.classifier = matrix(self.world, weight, layout.classes)
            if bias is not None and not isinstance(self.classifier, SpreadMatrix):
                self.bias = torch.cat(gathered(self.world, bias, _WHAT))
        indices = rows.targets.indices.to(features.device)
        class_counts = class_totals(layout.classes, indices, self.counts.double())
        class_counts = self.world.sum_(class_counts, _WHAT)
        if int((class_counts > 0).sum()) > 1:
            self.given.add("features")
            self.moments = SpreadMoments(features, rows, class_counts, layout)
            self.statistics = self.moments  # type: ignore[assignment]
        if penalties[0] is not None and penalties[1] is not None:
            self.given.add("penalties")
            self.lambda_w, self.lambda_h = penalties[0], penalties[1]

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
        ratio, over = self.lambda_h / self.lambda_w, (self.world, self.world)
        return geometry.imbalance(self.weight, self.features, ratio, self.counts, over)
