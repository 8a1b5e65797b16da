"""Where rows and their classes are, for what a head needs of both: the rows of W that are the rows'
targets, and sums of rows by class. Here all are in this process; `exchange` has those of several
ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ufm_fast.backends.sums import add_class_sums, class_totals


class Home:
    """Rows and classes that are all here. ``y``: the targets of the rows."""

    def __init__(self, y: Tensor) -> None:
        self.y = y

    def total(self, part: Tensor) -> Tensor:
        """A sum over all rows or classes, from that over those here."""
        return part

    def once(self, whole: Tensor) -> Tensor:
        """A part of the value that is known of the whole."""
        return whole

    def rows(self, W: Tensor) -> Callable[[slice], Tensor]:
        """The rows of W (or entries of a vector) that are the targets of a block of rows."""
        return lambda part: W.index_select(0, self.y[part])

    def targets(self, W: Tensor) -> Tensor:
        """Those of all rows."""
        return self.rows(W)(slice(None))

    def add(self, out: Tensor, part: slice, rows: Tensor, weight: Tensor | None = None) -> None:
        """out_k += the (weighted) sum of the rows of class k, of a block of rows."""
        add_class_sums(out, self.y[part], rows, weight)

    def settle(self, out: Tensor) -> None:
        """After the last ``add``."""

    def add_all(self, out: Tensor, rows: Tensor, weight: Tensor | None = None) -> None:
        """out_k += the (weighted) sum of the rows of class k, of all rows."""
        self.add(out, slice(None), rows, weight)
        self.settle(out)

    def totals(self, classes: int, weight: Tensor) -> Tensor:
        """The sum of the weights of each class."""
        return class_totals(classes, self.y, weight)
