"""Tall matrices read a block of rows at a time, with their mean row split off exactly.

Every Gram-type metric needs three things of a K x d matrix: its mean row, the Gram matrix of the
centred rows, and, where small singular values count, a triangular factor of the centred rows. All
are d x d and accumulate in float64, whatever the dtype of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.layout import Axis
from ufm_fast.layout import block as block_of

Index = Tensor | slice
SAMPLE_ROWS = 1024
BLOCK_ELEMENTS = (
    2**19
)  # 4 MiB of float64: a block and its product stay in cache; QR is twice as slow at 16 times this


def block_rows(dim: int) -> int:
    """Rows in a block: about `BLOCK_ELEMENTS` numbers, and tall enough for a QR step to be worth
    its stacking.
    """
    return max(2 * dim, BLOCK_ELEMENTS // dim)


def triangular_factor(blocks: Iterator[Tensor], like: Tensor) -> Tensor:
    """R (at most d x d) with R'R = X'X, for the matrix X whose rows come in `blocks`: a QR by
    sequential reduction.

    like: a float64 tensor of last dimension d on the device in use (needed where there are no
    blocks). Unlike a Cholesky factor or the eigenvalues of X'X it keeps singular values to eps |X|,
    not to sqrt(eps) |X|: the zeros of a rank-deficient X stay zeros, which the pseudo-inverse and
    the entropy of the spectrum both need.
    """
    factor = like.new_zeros(0, like.shape[-1])
    for block in blocks:
        factor = torch.linalg.qr(torch.cat([factor, block]), mode="r").R
    return factor


class RowMatrix:
    """A K x d matrix X = C + 1 m', with C its centred rows and m their mean, read in float64
    blocks.

    read: gives the rows at a slice or at an index tensor, in float64; nothing but `read` knows how
    the rows are stored. What it gives may be the data themselves: never write to it.
    The mean is subtracted in two parts, m = base + residual: x - base is exact where the rows are
    close to one another, so C keeps its relative accuracy even when the spread of the rows is 1e-10
    of their size.

    ``here``: rows that are read here, of ``count``; `spread` has matrices of which each rank reads
    its own. What is summed over the rows goes through ``total``, ``length`` and ``moments``.
    """

    def __init__(self, read: Callable[[Index], Tensor], count: int, dim: int) -> None:
        self.read, self.count, self.dim = read, count, dim
        self.here = count
        self._base = read(slice(0, count, -(-count // SAMPLE_ROWS))).mean(0)
        self._residual = torch.zeros_like(self._base)
        total = torch.zeros_like(self._base)
        for block in self.centred():
            total += block.sum(0)
        self._residual = total / count
        self.mean = self._base + self._residual
        self._inner: dict[RowMatrix, Tensor] = {}

    @classmethod
    def of(cls, data: Tensor) -> RowMatrix:
        """A matrix that is held as a (K, d) tensor of any floating dtype; no float64 copy is
        made.
        """
        return cls(lambda index: data[index].to(torch.float64), data.shape[0], data.shape[1])

    def take(self, index: Index) -> Tensor:
        """The centred rows at `index`."""
        return (self.read(index) - self._base).sub_(self._residual)

    def centred(self) -> Iterator[Tensor]:
        """The centred rows C, a block at a time."""
        size = block_rows(self.dim)
        return (self.take(slice(start, start + size)) for start in range(0, self.here, size))

    def alike(self, read: Callable[[Index], Tensor]) -> RowMatrix:
        """A matrix of other rows, as many, that are held where these are."""
        return RowMatrix(read, self.count, self.dim)

    def total(self, x: Tensor) -> Tensor:
        """A sum over the rows, from that over the rows here."""
        return x

    def length(self, values: Tensor) -> Tensor:
        """Euclidean norm of numbers of all rows, from those of the rows here."""
        norm: Tensor = torch.linalg.vector_norm(values)
        return norm

    def moments(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of a number a row, from those of the rows here."""
        return values.mean(), values.var()

    def share(self, axis: Axis) -> tuple[slice, int]:
        """The rows that a rank takes of a work on all, which are here; and the number of the first
        row here.
        """
        return block_of(self.count, axis.size, axis.place), 0

    def fetch(self, rows: Callable[[Tensor], Tensor], index: Tensor) -> Tensor:
        """What ``rows`` gives of the rows here, of those at these places among all; whoever holds
        a part of the matrix calls it.
        """
        return rows(index)

    def winner(self, best: Tensor, winner: Tensor) -> Tensor:
        """The row of the best score among all, from the best here and its row."""
        return winner

    @cached_property
    def factor(self) -> Tensor:
        """R with R'R = C'C, at most d x d."""
        return triangular_factor(self.centred(), self.mean)

    @cached_property
    def gram(self) -> Tensor:
        """C'C, d x d."""
        total = self.mean.new_zeros(self.dim, self.dim)
        for block in self.centred():
            total.addmm_(block.T, block)
        return total

    def inner(self, other: RowMatrix) -> Tensor:
        """Sum of the products of the centred rows of two matrices, remembered."""
        if other not in self._inner:
            pairs = zip(self.centred(), other.centred(), strict=True)
            self._inner[other] = sum(
                (torch.vdot(a.ravel(), b.ravel()) for a, b in pairs), self.mean.new_zeros(())
            )
        return self._inner[other]

    @cached_property
    def raw(self) -> View:
        """The matrix as it stands."""
        return RawView(self, self.mean)

    @cached_property
    def about_mean(self) -> View:
        """The matrix with its mean row subtracted."""
        return View(self, torch.zeros_like(self.mean))


class View:
    """The matrix C + 1 offset': the centred rows of a RowMatrix seen from a chosen origin. Costs
    nothing to make.
    """

    def __init__(self, rows: RowMatrix, offset: Tensor) -> None:
        self.rows, self.offset = rows, offset
        self.count, self.dim = rows.count, rows.dim

    def take(self, index: Index) -> Tensor:
        """The rows at `index`."""
        return self.rows.take(index).add_(self.offset)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, a block at a time."""
        return (block.add_(self.offset) for block in self.rows.centred())

    @cached_property
    def norms(self) -> Tensor:
        """Euclidean norm of each row that is here; its square may underflow, for a row is divided
        by its largest entry first.
        """
        none = self.offset.new_zeros(0)
        return torch.cat([none, *(_norms(block) for block in self.blocks())])

    @cached_property
    def factor(self) -> Tensor:
        """R with R'R equal to the Gram matrix of these rows: the centred factor with the offset put
        under it.
        """
        return torch.cat([self.rows.factor, self.count**0.5 * self.offset[None]])

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values, largest first, at most d of them."""
        values: Tensor = torch.linalg.svdvals(self.factor)
        return values

    @cached_property
    def unit(self) -> RowMatrix:
        """These rows at length one. A zero row has no direction: it gives nan."""
        return self.rows.alike(lambda index: self.take(index) / self.norms[index, None])


class RawView(View):
    """The matrix C + 1 m' of a RowMatrix with mean m, the rows read from the data: C + 1 m' would
    give a row that is small beside the mean the mean's rounding, 1e-6 of a row 1e-10 as long.
    """

    def take(self, index: Index) -> Tensor:
        """The rows at `index`. They may be the data themselves: never write to them."""
        return self.rows.read(index)

    def blocks(self) -> Iterator[Tensor]:
        """All rows, a block at a time."""
        size = block_rows(self.dim)
        return (self.take(slice(start, start + size)) for start in range(0, self.rows.here, size))


def _norms(block: Tensor) -> Tensor:
    largest = block.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(block / scale, dim=1) * scale[:, 0]
    return norms
