"""Rows of W for the rows of H that have them as targets, and sums back, where both are spread over
ranks.

A rank asks for each class that its rows name once, whoever holds it, and sends back one sum for it:
at most as many rows of d numbers each way as it has rows, and none where a class's rows are on the
rank of their class. Who asks whom is worked out once for the targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ufm_fast.backends.home import Home
from ufm_fast.backends.sums import add_class_sums
from ufm_fast.layout import Axis, Layout
from ufm_fast.targets import Targets

if TYPE_CHECKING:
    from ufm_fast.backends.base import HeadInput


@dataclass(frozen=True)
class _Requests:
    """``slot``: of each row, its class among those asked for; ``asked``: the rows of W here that
    others ask for, in the order of the ranks; ``counts``: how many of each rank, those that this
    one asks for and those that it is asked for.
    """

    slot: Tensor
    asked: Tensor
    counts: tuple[list[int], list[int]]

    @classmethod
    def of(cls, targets: Targets, layout: Layout) -> _Requests:
        key = "requests", layout.mesh.ranks, layout.classes
        if key not in targets.remembered:
            targets.remembered[key] = cls._made(targets.indices, layout)
        return cast("_Requests", targets.remembered[key])

    @classmethod
    def _made(cls, y: Tensor, layout: Layout) -> _Requests:
        world, ranks = layout.mesh.world, layout.mesh.ranks
        wanted, slot = torch.unique(y, return_inverse=True)
        number = torch.bincount(wanted // layout.class_height, minlength=ranks)
        ones = [1] * ranks
        of_others = world.swap(number, ones, ones, "targets")
        counts = number.tolist(), of_others.tolist()
        asked = world.swap(wanted, *counts, "targets") - layout.class_part.start
        return cls(slot, asked, counts)

    def fetch(self, world: Axis, W: Tensor) -> Tensor:
        """The rows of W that were asked for."""
        wanted, asked = self.counts
        return world.swap(W.index_select(0, self.asked), asked, wanted, "targets")

    def bring(self, world: Axis, sums: Tensor) -> Tensor:
        """The sums of others for the rows here, one for each of ``asked``."""
        return world.swap(sums, *self.counts, "targets")


class Exchange(Home):
    """Rows and classes of which this rank has its blocks."""

    def __init__(self, targets: Targets, layout: Layout) -> None:
        super().__init__(targets.indices)
        self.world, self._requests = layout.mesh.world, _Requests.of(targets, layout)
        self._sums: Tensor | None = None

    @classmethod
    def of(cls, x: HeadInput) -> Exchange:
        assert x.layout is not None
        return cls(x.targets, x.layout)

    def total(self, part: Tensor) -> Tensor:
        return self.world.sum_(part.clone(), "matrices")

    def once(self, whole: Tensor) -> Tensor:
        return whole if self.world.place == 0 else torch.zeros_like(whole)

    def rows(self, W: Tensor) -> Callable[[slice], Tensor]:
        fetched, slot = self._requests.fetch(self.world, W), self._requests.slot
        return lambda part: fetched.index_select(0, slot[part])

    def add(self, out: Tensor, part: slice, rows: Tensor, weight: Tensor | None = None) -> None:
        if self._sums is None:
            self._sums = self._empty(out.shape[1])
        add_class_sums(self._sums, self._requests.slot[part], rows, weight)

    def settle(self, out: Tensor) -> None:
        sums = self._empty(out.shape[1]) if self._sums is None else self._sums
        self._sums = None
        add_class_sums(out, self._requests.asked, self._requests.bring(self.world, sums))

    def totals(self, classes: int, weight: Tensor) -> Tensor:
        total = weight.new_zeros(classes, 1, dtype=torch.float64)
        self.add(total, slice(None), weight[:, None], torch.ones_like(weight))
        self.settle(total)
        return total[:, 0]

    def _empty(self, columns: int) -> Tensor:
        return torch.zeros(
            sum(self._requests.counts[0]), columns, dtype=torch.float64, device=self.y.device
        )


def home_of(targets: Targets, layout: Layout | None) -> Home:
    """Where these rows and their classes are."""
    return Home(targets.indices) if layout is None else Exchange(targets, layout)
