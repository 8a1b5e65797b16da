"""Dual rows that are spread over ranks: what each of them holds of a certificate, and how their
sums come together.

A rank has its own rows of H, and all of W and b: K (d + 1) numbers in float64 beside its blocks. So
the dual rows of its samples are here in full, a chunk at a time, as in one process; only what is
summed over rows, or is the least of them, is told to the others: class sums, the K x K Gram matrix
of an exact norm, or the K x r products of a probabilistic one. Every rank has all such sums, and
the norm and the decisions are the first one's: all have the same certificate whatever their
rounding.

2026-11-30. Shares of the classes too (`backends.sharded`) would spare the copy of W, but a bound
needs entropies of whole dual rows after the flow that balances a free bias, and an exact norm their
K x K Gram matrix, which has more entries than W wherever K > d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.layout import Layout, gathered
from ufm_fast.memory import available_bytes
from ufm_fast.tall import qr

_WHAT = "certificate"  # in the counts of bytes that are sent
#: Arrays of K x d that a probabilistic norm holds at a time, and the vectors of its Krylov space.
_ARRAYS, _VECTORS = 6, 64


@dataclass(frozen=True)
class Spread:
    """The ranks of a ``layout``; without one all is here, and each answer is what was given."""

    layout: Layout | None = None

    def total(self, part: Tensor) -> Tensor:
        """A sum over all rows from that over the rows here, in place."""
        return part if self.layout is None else self.layout.mesh.world.sum_(part, _WHAT)

    def number(self, part: float) -> float:
        """The same of a number."""
        return part if self.layout is None else self.layout.total(part)

    def least(self, part: float) -> float:
        return part if self.layout is None else self.layout.least(part)

    def agreed(self, answer: bool) -> bool:
        """The first rank's answer."""
        return answer if self.layout is None else self.layout.mesh.agreed(answer)

    def first(self, x: Tensor) -> Tensor:
        """The first rank's x, in place where it is contiguous."""
        return x if self.layout is None else self.layout.mesh.shared(x.contiguous())

    def once(self, whole: Tensor) -> Tensor:
        """What every rank has, as a part of a sum over them."""
        return (
            whole if self.layout is None or self.layout.mesh.rank == 0 else torch.zeros_like(whole)
        )

    def whole(self, classes: Tensor) -> Tensor:
        """All rows of W, or entries of b, from those here."""
        return (
            classes
            if self.layout is None
            else torch.cat(gathered(self.layout.mesh.world, classes, _WHAT))
        )

    def here(self, whole: Tensor) -> Tensor:
        """The rows of W, or entries of b, that are here, of all."""
        return whole if self.layout is None else whole[self.layout.class_part]

    def orthonormal(self, rows: Tensor) -> Tensor:
        """Q of the QR decomposition of a matrix of which these are the rows here."""
        return qr(rows, None if self.layout is None else self.layout.mesh)[0]

    @staticmethod
    def bytes_held(classes: int, dim: int) -> int:
        """What each of several ranks holds for a certificate beside its blocks, however many there
        are.
        """
        return 8 * classes * (_ARRAYS * dim + _VECTORS)

    def fits(self, classes: int, dim: int, device: torch.device) -> bool:
        """Whether every rank has room for what a certificate holds."""
        if self.layout is None:
            return True
        return self.least(available_bytes(device) - self.bytes_held(classes, dim)) > 0


#: All is here.
ALONE = Spread()
