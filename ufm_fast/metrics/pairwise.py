"""Metrics over all pairs of classes, or of samples and classes: O(K^2 d) or O(N K d), a tile at a
time.

Exact by streaming tiles, or estimated from pairs (rows, for NC4) drawn without replacement, with
the standard error of simple random sampling: s/sqrt(n) sqrt(1 - n/population). Rows that stand for
unequal counts are drawn with replacement, by their counts, and the error is s/sqrt(n).

Decisions

2026-11-26. A sample for NC4 draws rows by their counts, with replacement, where those differ: drawn
evenly, long-tailed counts made a biased estimate with an error a third too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ufm_fast.arguments import whole
from ufm_fast.errors import InputError
from ufm_fast.metrics.rows import View
from ufm_fast.metrics.statistics import ClassMoments, ClassStatistics

EXACT_CLASSES = 20_000  # 4e8 pairs: seconds to tens of seconds on two CPU cores at d = 128
PAIR_BLOCK = 2**16
# |a-b|^2 below this part of |a|^2 + |b|^2 is formed from a - b, as the expanded square has lost
# digits.
NEAR = 1e-4

Mode = Literal["auto", "exact", "sampled", "none"]


@dataclass(frozen=True)
class Estimate:
    """A mean over pairs and its standard error; the error is None where every pair was taken."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Sampling:
    """How pairwise metrics are taken.

    mode: "exact"; "sampled"; "auto" is exact up to `EXACT_CLASSES` classes and sampled beyond;
    "none" is for callers that skip them. pairs, rows: sample sizes for pairs of classes and for
    NC4. seed: of the draw. tile: classes in a tile.
    """

    mode: Mode = "auto"
    pairs: int = 2**18
    rows: int = 256
    seed: int = 0
    tile: int = 1024

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise InputError(
                f"pairwise must be one of {', '.join(get_args(Mode))}, got {self.mode!r}"
            )
        for name, least in (("pairs", 2), ("rows", 2), ("tile", 1), ("seed", 0)):
            object.__setattr__(self, name, whole(getattr(self, name), name, least, 2**63 - 1))

    def size(self, classes: int, population: int, wanted: int) -> int | None:
        """The sample size, or None where all is taken: a sample of half the population saves
        nothing.
        """
        if (
            self.mode == "exact"
            or (self.mode == "auto" and classes <= EXACT_CLASSES)
            or 2 * wanted > population
        ):
            return None
        return wanted

    def draw(self, population: int, size: int) -> Tensor:
        """`size` distinct numbers below `population`, uniform over all such sets, in no order."""
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.empty(0, dtype=torch.int64)
        while drawn.numel() < size:
            drawn = torch.unique(
                torch.cat([drawn, torch.randint(population, (size,), generator=generator)])
            )
        return drawn[torch.randperm(drawn.numel(), generator=generator)[:size]]

    def draw_weighted(self, weights: Tensor, size: int) -> Tensor:
        """`size` indices of `weights`, each drawn anew with a probability proportional to its
        weight.
        """
        generator = torch.Generator().manual_seed(self.seed)
        ends = weights.cpu().double().cumsum(0)
        drawn = torch.rand(size, dtype=torch.float64, generator=generator) * ends[-1]
        return torch.searchsorted(ends, drawn, right=True).clamp_max(len(ends) - 1)


def equiangularity(matrix: View, sampling: Sampling) -> tuple[Estimate, float]:
    """(1/(K(K-1))) sum_{k != l} |cos(a_k, a_l) + 1/(K-1)|, and the largest cosine of two different
    rows.

    0 for the simplex ETF. From a sample the largest cosine is a lower bound. nan if a row is zero.
    Time O(K^2 d).
    Source: Papyan, Han and Donoho, arXiv 2008.08186; the largest cosine: Jiang et al., arXiv
    2310.05351.
    """
    count = matrix.count
    size = sampling.size(count, count * (count - 1), sampling.pairs)
    if size is not None:
        cosines = torch.cat(
            [_pair_cosines(matrix, *pair) for pair in drawn_pairs(matrix, sampling, size)]
        )
        return estimate((cosines + 1 / (count - 1)).abs(), count * (count - 1)), float(
            cosines.max()
        )
    unit = torch.cat(list(matrix.blocks())) / matrix.norms[:, None]
    total, largest = unit.new_zeros(()), unit.new_full((), -math.inf)
    for rows, columns in _upper_tiles(count, sampling.tile):
        cosines = _strictly_upper(unit[rows] @ unit[columns].T, rows == columns)
        if cosines.numel():
            total += (cosines + 1 / (count - 1)).abs().sum()
            largest = torch.maximum(largest, cosines.max())
    return Estimate(2 * float(total) / (count * (count - 1))), float(largest)


def cdnv(statistics: ClassMoments, sampling: Sampling) -> Estimate:
    """Class-distance normalised variance: mean over k != l of (v_k + v_l)/(2 |mu_k - mu_l|^2), v_k
    = mean |h - mu_k|^2.

    Time O(K^2 d). Source: Galanti, Gyorgy and Hutter, arXiv 2112.15121.
    """
    means, variances, count = statistics.centred_means, statistics.variances, statistics.classes
    size = sampling.size(count, count * (count - 1), sampling.pairs)
    if size is not None:
        ratios = [
            (variances[k] + variances[l]) / (2 * (means.take(k) - means.take(l)).square().sum(1))
            for k, l in drawn_pairs(means, sampling, size)
        ]
        return estimate(torch.cat(ratios), count * (count - 1))
    points, total = means.take(slice(None)), variances.new_zeros(())
    for rows, columns in _upper_tiles(count, sampling.tile):
        ratio = (variances[rows, None] + variances[columns]) / (
            2 * square_distances(points[rows], points[columns])
        )
        total += _strictly_upper(ratio, rows == columns).sum()
    return Estimate(2 * float(total) / (count * (count - 1)))


def nc4(
    statistics: ClassStatistics, classifier: View, bias: Tensor | None, sampling: Sampling
) -> Estimate:
    """Share of samples where argmax_k (w_k.h + b_k) is the class of the nearest class mean. 1 at
    collapse.

    Equal scores go to the lowest class. All classes compete in the argmax, those with samples in
    the nearest mean. From a sample of rows its error reads 0 when all drawn rows agree.
    Time O(N K d). Source: Papyan, Han and Donoho, arXiv 2008.08186.
    """
    features, _, counts = statistics.rows
    population, weighted = features.shape[0], bool((counts != counts[0]).any())
    size = sampling.size(max(classifier.count, statistics.classes), population, sampling.rows)
    if size is not None:
        chosen = (
            sampling.draw_weighted(counts, size) if weighted else sampling.draw(population, size)
        )
        features = features[chosen.to(features.device)]
    zero = counts.new_zeros(classifier.count)
    agree = []
    for block in torch.split(features, sampling.tile):
        predicted = best_rows(
            block.to(torch.float64), classifier, zero if bias is None else bias, sampling.tile
        )
        means = statistics.centred_means
        nearest = best_rows(
            statistics.about_classes(block), means, -means.norms.square() / 2, sampling.tile
        )
        agree.append(predicted == statistics.present[nearest])
    same = torch.cat(agree).to(torch.float64)
    if size is None:
        return Estimate(float((counts * same).sum() / counts.sum()))
    return estimate(same, None if weighted else population)


def best_rows(points: Tensor, matrix: View, shift: Tensor, tile: int) -> Tensor:
    """argmax_k of a_k.x + shift_k for each point x, the lowest k on equal scores, a tile of classes
    at a time.
    """
    best = points.new_full((points.shape[0],), -math.inf)
    winner = torch.zeros(points.shape[0], dtype=torch.int64, device=points.device)
    for start in range(0, matrix.rows.here, tile):
        classes = slice(start, start + tile)
        score, index = (points @ matrix.take(classes).T + shift[classes]).max(1)
        better = score > best
        best, winner = torch.where(better, score, best), torch.where(better, index + start, winner)
    return matrix.rows.winner(best, winner)


def square_distances(left: Tensor, right: Tensor) -> Tensor:
    """|a - b|^2 of all rows, by a matrix product, and directly for the pairs that are near to one
    another.
    """
    sizes = left.square().sum(1, keepdim=True) + right.square().sum(1)
    squares = sizes - 2 * left @ right.T
    near = (squares < NEAR * sizes).nonzero()
    for pairs in torch.split(near, PAIR_BLOCK):
        i, j = pairs.unbind(1)
        squares[i, j] = (left[i] - right[j]).square().sum(1)
    return squares


def _upper_tiles(count: int, tile: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, count, tile):
        for j in range(i, count, tile):
            yield slice(i, i + tile), slice(j, j + tile)


def _strictly_upper(values: Tensor, diagonal: bool) -> Tensor:
    """All entries of a tile, or of a tile on the diagonal those above it, so that each pair is met
    once.
    """
    if not diagonal:
        return values
    return values[torch.ones_like(values, dtype=torch.bool).triu(1)]


def drawn_pairs(matrix: View, sampling: Sampling, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random ordered pairs (k, l), k != l, a block at a time."""
    drawn = sampling.draw(matrix.count * (matrix.count - 1), size).to(matrix.offset.device)
    for block in torch.split(drawn, PAIR_BLOCK):
        first, second = block // (matrix.count - 1), block % (matrix.count - 1)
        yield first, second + (second >= first)


def _pair_cosines(matrix: View, first: Tensor, second: Tensor) -> Tensor:
    left, right = (matrix.take(index) / matrix.norms[index, None] for index in (first, second))
    return (left * right).sum(1)


def estimate(values: Tensor, population: int | None) -> Estimate:
    """Mean of a sample without replacement from a population of that size, or with replacement
    (None).
    """
    size = values.numel()
    left = 1.0 if population is None else 1 - size / population
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(size) * math.sqrt(left))
