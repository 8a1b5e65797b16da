"""The gradient G of a softmax head in the logits, on the rows of one chunk, and how it changes
along a direction.

For a row with weight o, slope g' = dg/dl and M targets (a factor M g' = M of the pick-all loss) it
is

    o g' p E_k / s'  off target,      -o g' p  on a single target,

no difference of nearly equal numbers; several targets and smoothing's even part -o eps / K have
their own terms. Products with G come from E and vectors of the rows alone, or E is overwritten by G
itself (``store``).

Decisions

2026-11-25. Smoothing's part of the bias gradient is added once, as the weight of each class less
the mean, exactly zero for equal classes. Added as two parts chunk by chunk it left rounding where
at margins of 50 nats nothing else is left.

2026-11-26. A Hessian product takes the mean off first. Where a wrong class has all the mass, its
change and the mean of all changes cancelled in float32: up to 5e-3 of the largest entry, 1e-5 now,
for one more pass over the changes (`tests/backends/test_tiled.py`). The kernels still do it in one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients
from ufm_fast.backends.sums import (
    add_class_sums,
    add_product,
    class_totals,
    sums_along,
    weighted_sum,
)
from ufm_fast.backends.sweep import Chunk
from ufm_fast.losses import SoftmaxLoss

_BLOCK = 4096  # classes at a time where an elementwise product is summed


class ChunkGradient:
    """G on the rows of a chunk: ``factor`` E off the targets, ``exact`` at their entries, ``even``
    everywhere.
    """

    def __init__(self, loss: SoftmaxLoss, chunk: Chunk, dtype: torch.dtype | None = None) -> None:
        self.chunk, dtype, c = chunk, dtype or chunk.E.dtype, chunk
        self.slope = _slope(loss, c)
        self.factor = (self.slope * c.p / c.mass).to(dtype)
        self.exact = _entries(loss, c, self.slope)
        self.entry = self.exact.to(dtype)
        # Its sum over the rows is the caller's (`uneven`): there it would cancel the digits of what
        # is left near collapse.
        self.even = (
            (-loss.smoothing / c.classes * c.row_weight).to(dtype) if loss.smoothing else None
        )
        self.stored = False

    def store(self, class_sums: Tensor | None) -> None:
        """E becomes G but for the even part, and ``class_sums`` gains G'1 (the even part left
        out).
        """
        c = self.chunk
        c.E.mul_(self.factor)
        self.stored = True
        if class_sums is not None:
            self.add_class_sums(class_sums)
        c.E[c.entry_class, c.entry_row] = self.entry

    def add_class_sums(self, out: Tensor) -> None:
        """out += G'1, float64 (K,), the even part left out; before ``store`` or by it."""
        E = self.chunk.E
        out.add_(E.sum(1) if self.stored else sums_along(E, self.factor))
        self.add_entry_sums(out)

    def add_entry_sums(self, out: Tensor) -> None:
        """The target entries' part of ``add_class_sums``."""
        c = self.chunk
        pull = self.exact if self.even is None else c.of_entries(-self.slope * c.p)
        out.add_(class_totals(out.shape[0], c.entry_class, pull))

    def add_times(self, right: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        """out += G right for the chunk's rows of it, or = with ``fresh``."""
        c = self.chunk
        if self.stored:
            torch.addmm(out, c.E.T, right, beta=0 if fresh else 1, out=out)
        else:
            product = torch.mm(c.E.T, right, out=out) if fresh else c.E.T @ right
            product.mul_(self.factor[:, None])
            self.add_entry_times(right, product)
            if not fresh:
                out.add_(product)
        self.add_even_times(right, out)

    def add_entry_times(self, right: Tensor, out: Tensor) -> None:
        """The target entries' part of ``add_times``."""
        c = self.chunk
        rows = right.index_select(0, c.entry_class)
        if c.single:
            out.addcmul_(rows, self.entry[:, None])
        else:
            out.index_add_(0, c.entry_row, rows.mul_(self.entry[:, None]))

    def add_even_times(self, right: Tensor, out: Tensor) -> None:
        """The even part of ``add_times``."""
        if self.even is not None:
            out.add_(torch.outer(self.even, right.sum(0)))

    def add_transposed_times(self, left: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        """out += G' left for the chunk's rows of ``left``, or = with ``fresh``."""
        c = self.chunk
        add_product(out, c.E, left if self.stored else left * self.factor[:, None], fresh=fresh)
        if not self.stored:
            self.add_entry_transposed(left, out)
        self.add_even_transposed(left, out)

    def add_entry_transposed(self, left: Tensor, out: Tensor) -> None:
        """The target entries' part of ``add_transposed_times``."""
        c = self.chunk
        rows = left if c.single else left.index_select(0, c.entry_row)
        add_class_sums(out, c.entry_class, rows, self.exact)

    def add_even_transposed(self, left: Tensor, out: Tensor) -> None:
        """The even part of ``add_transposed_times``."""
        if self.even is not None:
            out.add_(weighted_sum(left, self.even))


def uneven(labels: Tensor, row_weight: Tensor, classes: int) -> Tensor:
    """Weight of each class's rows less the mean over the classes, float64 (K,): exactly zero where
    all are equal.
    """
    return centred(class_totals(classes, labels, row_weight.double()))


def centred(weight: Tensor) -> Tensor:
    """Numbers less their mean, exactly zero where all are equal."""
    weight = weight - weight[0]
    return weight - weight.mean()


def _slope(loss: SoftmaxLoss, c: Chunk) -> Tensor:
    """Row weight times g' (M where it has several targets)."""
    if loss.multi_label:
        return c.row_weight * c.M
    plain = (
        type(loss).weight is SoftmaxLoss.weight
    )  # g' = 1: two passes less over a small head's vectors
    return c.row_weight if plain else c.row_weight * loss.weight(c.l, c.p)


def _entries(loss: SoftmaxLoss, c: Chunk, slope: Tensor) -> Tensor:
    """Gradient in the logits at the target entries: -slope p for a single label, plus smoothing.

    For several targets M q share_k - 1 = q (M expm1(u_k) - D) / T - p, which does not cancel when
    the targets are level.
    """
    if not loss.multi_label:
        pull = -slope * c.p
        return c.of_entries(pull + loss.smoothing * c.row_weight if loss.smoothing else pull)
    q = 1.0 - c.p
    rise = torch.expm1(c.entry_logit - c.mean_target[c.entry_row])
    level = c.excess < 1.0
    total = c.M / (1.0 - c.excess).clamp_min(1e-300)  # T = M + D, since D / T = excess
    near = (
        q[c.entry_row] * (c.M[c.entry_row] * rise / total[c.entry_row] - c.excess[c.entry_row])
        - c.p[c.entry_row]
    )
    far = (q * c.M)[c.entry_row] * c.entry_share - 1.0
    return c.row_weight[c.entry_row] * torch.where(level[c.entry_row], near, far)


def add_change(loss: SoftmaxLoss, c: Chunk, W: Tensor, dz: Tensor, out: Gradients) -> None:
    """Add dG W, dG' H and dG'1 (float64) for a change dz (K x C) of the logits. E and dz are
    overwritten.

    With z~ the change relative to the targets' mean change, dG is weight p (E/s') (dz - z~) off
    target, and the mean of dz under E/s' decides everything.
    """
    exact = changed(loss, c, dz)
    add_products(c, W, out)
    add_entries(c, W, exact, out)


def add_products(c: Chunk, W: Tensor, out: Gradients) -> None:
    """Add E W, E' H and E'1 (float64), whatever stands in E."""
    if out.features is not None:
        out.features[c.start : c.stop].addmm_(c.E.T, W)
    if out.weight is not None:
        add_product(out.weight, c.E, c.features)
    if out.bias is not None:
        out.bias.add_(c.E.sum(1))


def add_entries(c: Chunk, W: Tensor, exact: Tensor, out: Gradients) -> None:
    """The same of a matrix that is ``exact`` at the target entries and zero elsewhere."""
    if out.features is not None:
        pull = W.index_select(0, c.entry_class).mul_(exact.to(W.dtype)[:, None])
        out.features[c.start : c.stop].index_add_(0, c.entry_row, pull)
    if out.weight is not None:
        rows = c.features if c.single else c.features.index_select(0, c.entry_row)
        add_class_sums(out.weight, c.entry_class, rows, exact)
    if out.bias is not None:
        out.bias.add_(class_totals(out.bias.shape[0], c.entry_class, exact))


def changed(loss: SoftmaxLoss, c: Chunk, dz: Tensor) -> Tensor:
    """E becomes dG off target for a change dz of the logits, which is overwritten; returned are the
    target entries of dG, float64.
    """
    entry_dz = dz[c.entry_class, c.entry_row].double()
    target_dz = c.row_sum(entry_dz if c.single else entry_dz * c.entry_share)
    # Taken off first, so that a class with nearly all the mass is left with a small number, and not
    # two that cancel.
    middle = c.total(column_products(c.E, dz).double() / c.mass).to(dz.dtype)
    dz.sub_(middle)
    rest = c.total(column_products(c.E, dz).double() / c.mass)
    rows = RowChange.of(loss, c, middle.double() + rest - target_dz, rest)
    c.E.mul_(dz.mul_(rows.factor.to(dz.dtype)).add_(rows.shift.to(dz.dtype)))
    return rows.apart(c, entry_dz, target_dz) - rows.pull[c.entry_row] * c.entry_share


class RowChange(NamedTuple):
    """dG of the rows of a chunk, float64: E (factor dz + shift) off target, ``pull`` in all; minus
    that at the targets, by their shares, and ``held`` times what their own changes differ by.
    """

    factor: Tensor
    shift: Tensor
    pull: Tensor
    held: Tensor

    @classmethod
    def of(cls, loss: SoftmaxLoss, c: Chunk, mean: Tensor, rest: Tensor) -> RowChange:
        """``mean``: of dz under E/s', less the targets' mean change; ``rest``: the same of dz as
        it will be multiplied.
        """
        slope, bend = (
            _slope(loss, c),
            torch.zeros_like(c.p) if loss.multi_label else c.row_weight * loss.bend(c.l, c.p),
        )
        scale, q = c.p / c.mass, 1.0 - c.p
        shift = scale * ((slope * q + bend) * mean - slope * rest)
        return cls(slope * scale, shift, (slope * q + bend) * c.p * mean, slope * q)

    def apart(self, c: Chunk, entry_dz: Tensor, target_dz: Tensor) -> Tensor:
        """What the target entries of a row differ by; its sum is zero."""
        return self.held[c.entry_row] * c.entry_share * (entry_dz - target_dz[c.entry_row])


def column_products(A: Tensor, B: Tensor) -> Tensor:
    """Inner products of the columns of A and B, by blocks of rows that bound the memory of the
    elementwise product.
    """
    total = A.new_zeros(A.shape[1])
    for start in range(0, A.shape[0], _BLOCK):
        total += (A[start : start + _BLOCK] * B[start : start + _BLOCK]).sum(0)
    return total
