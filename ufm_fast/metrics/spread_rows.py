"""Matrices whose rows are spread over ranks, as `rows.RowMatrix` has them of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.layout import Axis, gathered
from ufm_fast.metrics.rows import Index, RowMatrix, triangular_factor

_WHAT = "metrics"  # in the counts of bytes that are sent


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

    @cached_property
    def ends(self) -> Tensor:
        """After the last row of each rank."""
        sizes = torch.tensor([self.here], device=self.mean.device)
        return self.world.gather(sizes, _WHAT).wait().cumsum(0)

    @property
    def first(self) -> int:
        """The number of the first row here among all."""
        return int(self.ends[self.world.place]) - self.here

    def share(self, axis: Axis) -> tuple[slice, int]:
        return slice(self.first, self.first + self.here), self.first

    def fetch(self, rows: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
        owner = torch.searchsorted(self.ends, index, right=True)
        order, ones = torch.argsort(owner, stable=True), [1] * self.world.size
        wanted = torch.bincount(owner, minlength=self.world.size)
        counts = wanted.tolist(), self.world.swap(wanted, ones, ones, _WHAT).tolist()
        asked = self.world.swap(index[order], *counts, _WHAT) - self.first
        found = self.world.swap(rows(asked), counts[1], counts[0], _WHAT)
        return torch.empty_like(found).index_copy_(0, order, found)

    def winner(self, best: Tensor, winner: Tensor) -> Tensor:
        """The lowest row of the best score, from the best here."""
        top = self.world.most_(best.clone(), _WHAT)
        lowest = torch.where(best == top, winner + self.first, self.count)
        return -self.world.most_(-lowest, _WHAT)


def of_ranks(world: Axis, factor: Tensor) -> Tensor:
    """The triangular factor of all rows from that of the rows here."""
    return triangular_factor(iter(gathered(world, factor, _WHAT)), factor)
