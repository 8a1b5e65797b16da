"""The metrics of `pairwise` of a point on several ranks.

All pairs: tiles of rows go from the ranks that hold them to all, which compare them with their own.
Drawn pairs: all ranks draw the same and share them out, and each asks the others for the rows of
its own. Samples go to all ranks, a tile at a time, and each tells the best of its classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ufm_fast.layout import Axis, gathered
from ufm_fast.metrics.pairwise import (
    Estimate,
    Sampling,
    best_rows,
    drawn_pairs,
    estimate,
    square_distances,
)
from ufm_fast.metrics.rows import RowMatrix, View
from ufm_fast.metrics.statistics import ClassMoments

_WHAT = "metrics"  # in the counts of bytes that are sent
_Rows = Callable[[Tensor], Tensor]  # rows of numbers, of the rows of a matrix that are here


def equiangularity(view: View, sampling: Sampling, world: Axis) -> tuple[Estimate, float]:
    """`pairwise.equiangularity` of the rows of all ranks."""
    count = view.count

    def unit(index: Tensor) -> Tensor:
        return view.take(index) / view.norms[index, None]

    size = sampling.size(count, count * (count - 1), sampling.pairs)
    if size is not None:
        cosines = _of_drawn(view, unit, sampling, size, world, lambda a, b: (a * b).sum(1))
        gaps = (cosines + 1 / (count - 1)).abs()
        return estimate(gaps, count * (count - 1)), float(cosines.max())
    total, largest = view.offset.new_zeros(()), view.offset.new_full((), -math.inf)
    for left, right, same in _tiles(view.rows, unit, sampling.tile, world):
        cosines = (left @ right.T)[~same]
        total += (cosines + 1 / (count - 1)).abs().sum()
        if cosines.numel():
            largest = torch.maximum(largest, cosines.max())
    mean = float(world.sum_(total, _WHAT)) / (count * (count - 1))
    return Estimate(mean), float(world.most_(largest, _WHAT))


def cdnv(statistics: ClassMoments, sampling: Sampling, world: Axis) -> Estimate:
    """`pairwise.cdnv` of the classes of all ranks."""
    means, variances, count = statistics.centred_means, statistics.variances, statistics.classes

    def rows(index: Tensor) -> Tensor:
        return torch.cat([means.take(index), variances[index, None]], 1)

    size = sampling.size(count, count * (count - 1), sampling.pairs)
    if size is not None:
        ratios = _of_drawn(means, rows, sampling, size, world, _ratio)
        return estimate(ratios, count * (count - 1))
    total = variances.new_zeros(())
    for left, right, same in _tiles(means.rows, rows, sampling.tile, world):
        squares = square_distances(left[:, :-1], right[:, :-1])
        total += ((left[:, -1:] + right[:, -1]) / (2 * squares))[~same].sum()
    return Estimate(float(world.sum_(total, _WHAT)) / (count * (count - 1)))


def _ratio(left: Tensor, right: Tensor) -> Tensor:
    squares = (left[:, :-1] - right[:, :-1]).square().sum(1)
    return (left[:, -1] + right[:, -1]) / (2 * squares)


def nc4(
    statistics: ClassMoments,
    here: tuple[Tensor, Tensor],
    classifier: View,
    bias: Tensor | None,
    sampling: Sampling,
    world: Axis,
) -> Estimate:
    """`pairwise.nc4` of the rows of all ranks; ``here``: features and counts of this one's."""
    features, own = here
    parts = gathered(world, own, _WHAT)
    counts, first = torch.cat(parts), sum(map(len, parts[: world.place]))
    population, weighted = len(counts), bool((counts != counts[0]).any())
    size = sampling.size(max(classifier.count, statistics.classes), population, sampling.rows)
    if size is None:
        chosen = torch.arange(population)
    else:
        chosen = (
            sampling.draw_weighted(counts, size) if weighted else sampling.draw(population, size)
        )
    means, agree = statistics.centred_means, []
    nearness = -means.norms.square() / 2
    shift = own.new_zeros(classifier.rows.here) if bias is None else bias
    for index in torch.split(chosen.to(features.device), sampling.tile):
        mine = (index >= first) & (index < first + len(own))
        points = features.new_zeros(len(index), features.shape[1], dtype=torch.float64)
        points[mine] = features[index[mine] - first].double()
        world.sum_(points, _WHAT)
        predicted = best_rows(points, classifier, shift, sampling.tile)
        nearest = best_rows(statistics.about_classes(points), means, nearness, sampling.tile)
        agree.append(predicted == statistics.present[nearest])
    same = torch.cat(agree).to(torch.float64)
    if size is None:
        return Estimate(float((counts * same).sum() / counts.sum()))
    return estimate(same, None if weighted else population)


def _of_drawn(
    view: View,
    rows: _Rows,
    sampling: Sampling,
    size: int,
    world: Axis,
    compare: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A number of each drawn pair, those of all ranks."""
    found = []
    for pair in drawn_pairs(view, sampling, size):
        left, right = (
            view.rows.fetch(rows, index[world.place :: world.size].contiguous()) for index in pair
        )
        found.append(compare(left, right))
    return torch.cat(gathered(world, torch.cat(found), _WHAT))


def _tiles(
    matrix: RowMatrix, rows: _Rows, tile: int, world: Axis
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's rows against all, a tile of each at a time, and which of them are one and the
    same.
    """
    device, (part, first) = matrix.mean.device, matrix.share(world)
    own = torch.arange(part.start, part.stop, device=device)
    for start in range(0, matrix.count, tile):
        columns = torch.arange(start, min(start + tile, matrix.count), device=device)
        right = matrix.fetch(rows, columns)
        for index in torch.split(own, tile):
            yield rows(index - first), right, index[:, None] == columns
