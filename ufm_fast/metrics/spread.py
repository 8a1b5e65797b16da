"""Metrics of a point on several ranks.

A rank has its block of W, and the means of the same classes, summed from the ranks that hold their
rows (`exchange`). So what compares a row of W with its class's mean is a sum over classes, and what
goes by norms, spectra and Gram matrices needs d x d numbers of each rank. No rank has all of W or
of the means, but where K <= d + 1: then they are no more numbers than those sums, and formulas that
go entry by entry want them whole. What compares pairs of classes, or samples with all classes, is
in `spread_pairwise`. A point of few numbers the first rank measures as a whole
(`measure.GATHERED`).
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
from ufm_fast.metrics import geometry, spread_pairwise
from ufm_fast.metrics.collect import collected
from ufm_fast.metrics.inputs import Inputs
from ufm_fast.metrics.pairwise import Estimate, Sampling
from ufm_fast.metrics.rows import RowMatrix, View, triangular_factor
from ufm_fast.metrics.spread_rows import SpreadMatrix, matrix, of_ranks
from ufm_fast.metrics.statistics import ClassMoments
from ufm_fast.spread import Spread
from ufm_fast.targets import Rows

_WHAT = "metrics"  # in the counts of bytes that are sent
_OfRows = Callable[[slice], Tensor]  # a row for each of a block of rows


def spread_metrics(
    features: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    layout: Layout,
    penalties: tuple[float | None, float | None],
    sampling: Sampling,
) -> dict[str, float]:
    """The metrics that ``collect`` has, the same on every rank.

    features (R x d), ``rows`` (the target and count of each), weight and bias: this rank's blocks.
    weight None: the class means' own. penalties: lambda_w and lambda_h. Where one class has all
    rows, the metrics are the classifier's own.
    """
    found = collected(SpreadInputs(features, weight, bias, rows, layout, penalties, sampling))
    numbers = torch.tensor(list(found.values()), dtype=torch.float64, device=features.device)
    return dict(zip(found, layout.mesh.shared(numbers).tolist(), strict=True))


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
        self.present = torch.nonzero(class_counts > 0)[:, 0]
        totals = self._exchange.totals(len(self.kept), torch.cat(self._squares))
        self.variances = totals[self.kept] / own
        if not isinstance(self.means, SpreadMatrix):
            self.variances = torch.cat(gathered(world, self.variances, _WHAT))
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
        """Rows sqrt(n_i) (h_i - mu_{y_i}); their squares are kept."""
        rest, self._squares = self._exchange.rows(residual), [self._weight.new_zeros(0)]
        for part in row_blocks(len(self._features)):
            deviation = (self._features[part].double() - about(part)) - rest(part)
            deviation *= self._counts[part, None].sqrt()
            self._squares.append(deviation.square().sum(1))
            yield deviation

    @property
    def here(self) -> tuple[Tensor, Tensor]:
        """The features and counts of this rank's rows."""
        return self._features, self._counts


def bias_beside(classifier: RowMatrix, bias: Tensor | None, world: Axis) -> Tensor | None:
    """The entries of b of the rows of W that are here."""
    if bias is None or isinstance(classifier, SpreadMatrix):
        return bias
    return torch.cat(gathered(world, bias, _WHAT))


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
        sampling: Sampling,
    ) -> None:
        self.sampling, self.layout = sampling, layout
        self.world, self.features = layout.mesh.world, features
        self.counts, self.given = rows.counts.to(features.device), set[str]()
        if weight is not None:
            self.given.add("weight")
            self.weight = weight
            self.classifier = matrix(self.world, weight, layout.classes)
            self.bias = bias_beside(self.classifier, bias, self.world)
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
        ratio, every = self.lambda_h / self.lambda_w, Spread(self.layout, _WHAT)
        return geometry.imbalance(self.weight, self.features, ratio, self.counts, (every, every))

    @cached_property
    def classifier_pairs(self) -> tuple[Estimate, float]:
        return spread_pairwise.equiangularity(self.classifier.raw, self.sampling, self.world)

    @cached_property
    def mean_pairs(self) -> tuple[Estimate, float]:
        means = self.moments.centred_means
        return spread_pairwise.equiangularity(means, self.sampling, self.world)

    @cached_property
    def nearest(self) -> Estimate:
        of_both = self.moments, self.moments.here, self.classifier.raw, self.bias
        return spread_pairwise.nc4(*of_both, self.sampling, self.world)

    @cached_property
    def distances(self) -> Estimate:
        return spread_pairwise.cdnv(self.moments, self.sampling, self.world)
