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

import torch

from ufm_fast.layout import Layout
from ufm_fast.memory import available_bytes
from ufm_fast.spread import Spread

#: Arrays of K x d that a probabilistic norm holds at a time, and the vectors of its Krylov space.
_ARRAYS, _VECTORS = 6, 64


def spread_over(layout: Layout | None) -> Spread:
    """The ranks that make a certificate."""
    return Spread(layout, "certificate")


def bytes_held(classes: int, dim: int) -> int:
    """What each of several ranks holds for a certificate beside its blocks, however many there
    are.
    """
    return 8 * classes * (_ARRAYS * dim + _VECTORS)


def fits(layout: Layout, classes: int, dim: int, device: torch.device) -> bool:
    """Whether every rank has room for that."""
    return layout.least(available_bytes(device) - bytes_held(classes, dim)) > 0
