"""What is spread over ranks, for code that one process runs too: there all is here, and each answer
is what was given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.layout import Layout, Mesh, gathered
from ufm_fast.tall import of_first


@dataclass(frozen=True)
class Spread:
    """The ranks of a ``layout``, or none. ``what``: in the counts of bytes that are sent."""

    layout: Layout | None = None
    what: str = "sums"

    @property
    def mesh(self) -> Mesh | None:
        return None if self.layout is None else self.layout.mesh

    def total(self, part: Tensor) -> Tensor:
        """A sum over all rows from that over the rows here, in place."""
        return part if self.layout is None else self.layout.mesh.world.sum_(part, self.what)

    def most(self, part: Tensor) -> Tensor:
        """The largest of the ranks, entry by entry, in place."""
        return part if self.layout is None else self.layout.mesh.world.most_(part, self.what)

    def number(self, part: float) -> float:
        """The sum of a number."""
        return part if self.layout is None else self.layout.total(part)

    def least(self, part: float) -> float:
        return part if self.layout is None else self.layout.least(part)

    def all(self, answer: bool) -> bool:
        """Whether it is so on every rank."""
        return answer if self.layout is None else self.layout.all(answer)

    def agreed(self, answer: bool) -> bool:
        """The first rank's answer."""
        return answer if self.layout is None else self.layout.mesh.agreed(answer)

    def first(self, x: Tensor) -> Tensor:
        """The first rank's x, in place where it is contiguous."""
        return of_first(x, self.mesh)

    def once(self, whole: Tensor) -> Tensor:
        """What every rank has, as a part of a sum over them."""
        alone = self.layout is None or self.layout.mesh.rank == 0
        return whole if alone else torch.zeros_like(whole)

    def whole(self, part: Tensor) -> Tensor:
        """All rows of a matrix, or entries of a vector, from those here."""
        if self.layout is None:
            return part
        return torch.cat(gathered(self.layout.mesh.world, part, self.what))

    def here(self, whole: Tensor) -> Tensor:
        """The rows of W, or entries of b, that are here, of all."""
        return whole if self.layout is None else whole[self.layout.class_part]


#: All is here.
ALONE = Spread()
