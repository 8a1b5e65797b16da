"""A rank's part of a Hessian product of the sharded softmax head by the kernels of ufm_kernels.

With E of this rank's classes, s' its sum over all ranks and dz the change of the logits:

    mean of dz under E = sum over the ranks of (h . (E dW) + dh . (E W) + E db) / s'
    dG = E (factor (dz - mean) + shift) off target,    -share x (sum of that over the ranks) on it

and the products dG W, dG' H, dG'1, beside G dW and G' dH (`logit_gradient.RowChange` has factor and
shift). So a rank says two numbers a row before E is overwritten by dG, the mean and that of the
targets' own changes, and one after: the row's sum of dG as it was rounded, which the rank of the
target takes off there. Then a row of the product sums to zero over all ranks.

The mean is taken off in the kernel's own float32, so where a wrong class has all the mass its small
rest errs by the rounding of the products above; torch forms that rest anew, with a second pass and
a message more. A rank without kernels (`triton_sharded`) says what those with them say, so it does
not either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.exponentials import target_logits
from ufm_fast.backends.logit_gradient import (
    RowChange,
    add_entries,
    add_products,
    column_products,
)
from ufm_fast.backends.sharded_hessian import Direction
from ufm_fast.backends.sweep import Chunk
from ufm_kernels.head_parts import add_weight, features_of
from ufm_kernels.hvp import move_exponentials
from ufm_kernels.operands import operand
from ufm_kernels.products import add_weighted_sums

if TYPE_CHECKING:
    from ufm_fast.backends.triton_sharded import KernelSweep


class KernelDirection(Direction):
    """A direction along which chunks are moved by kernels, or by torch where the sweep does."""

    sweep: KernelSweep

    def __init__(self, sweep: KernelSweep, v: HeadInput) -> None:
        super().__init__(sweep, v)
        if len(self.dW):
            self.operand, self.seen = self.prepared(self.dW)
            self.of_logits = None if self.db is None else self.db.contiguous()

    def prepared(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A direction as an operand, and as the tiles see it, for the targets' changes: rounded
        alike.
        """
        mode = self.sweep.mode
        moved = operand(x, mode.logits, mode.passes)
        return moved, features_of(x, moved, mode)[:, : x.shape[1]]

    def add(self, c: Chunk, dh: Tensor, out: Gradients) -> None:
        sweep, rows = self.sweep, len(c.mass)
        part: _Part = _ByKernels(self, c, dh) if sweep.kernels else _ByTorch(self, c, dh)
        part.add_gradient(out)
        if sweep.tilt is not None:
            sweep.tilt.add(Gradients(out.features, out.weight, None), dh, self.dW)
        entry_dz = part.of_entries()
        own = torch.zeros_like(c.mass).index_add_(0, c.entry_row, entry_dz * c.entry_share)
        target_dz, mean = torch.split(c.total(torch.cat([own, part.mean()])), rows)
        base = mean.to(sweep.W.dtype)
        change = RowChange.of(sweep.loss, c, mean - target_dz, mean - base)
        moved = c.total(part.move(base, change))
        part.add_change(out)
        pull = moved[c.entry_row] * c.entry_share
        add_entries(c, sweep.W, change.apart(c, entry_dz, target_dz) - pull, out)


class _Part(Protocol):
    """This rank's classes and a chunk of rows: what is computed between the messages."""

    def add_gradient(self, out: Gradients) -> None:
        """Add G dW and G' dH."""

    def of_entries(self) -> Tensor:
        """The change of the target entries' logits, float64."""

    def mean(self) -> Tensor:
        """The part of the mean change that is these classes', float64."""

    def move(self, base: Tensor, change: RowChange) -> Tensor:
        """E becomes dG off target; its row sums, float64."""

    def add_change(self, out: Gradients) -> None:
        """Add dG W, dG' H and dG'1 off target."""


class _ByKernels:
    def __init__(self, along: KernelDirection, c: Chunk, dh: Tensor) -> None:
        self.along, self.sweep, self.c, self.dh = along, along.sweep, c, dh
        self.G = self.sweep.kernel_gradient(c)
        self.turned = self.G.exponentials_times(along.dW)
        self.operand, self.seen = along.prepared(dh)

    def add_gradient(self, out: Gradients) -> None:
        if out.features is not None:
            self.G.add_scaled(self.turned, self.along.dW, out.features)
        if out.weight is not None:
            self.G.add_transposed_times(self.dh, out.weight)

    def of_entries(self) -> Tensor:
        c, along, W = self.c, self.along, self.sweep.W
        rows, classes = c.entry_row, c.entry_class
        dz = target_logits(self.seen, W, rows, classes, False)
        dz += target_logits(c.features, along.seen, rows, classes, False)
        return dz if along.db is None else dz + along.db[classes]

    def mean(self) -> Tensor:
        c, along, passes = self.c, self.along, self.sweep.mode.passes
        of_weight = self.G.exponentials_times(self.sweep.W)
        total = (c.features * self.turned).sum(1, dtype=torch.float64)
        total += (self.dh * of_weight).sum(1, dtype=torch.float64)
        if along.of_logits is not None:
            add_weighted_sums(
                total,
                c.E,
                along.of_logits,
                passes=passes,
                classes=len(along.of_logits),
                transposed=False,
            )
        return total * self.sweep.rescale / c.mass

    def move(self, base: Tensor, change: RowChange) -> Tensor:
        along, sweep = self.along, self.sweep
        slope, shift = ((x * sweep.rescale).float() for x in (change.factor, change.shift))
        sums = move_exponentials(
            *(sweep.rows_operand, sweep.operand, self.operand, along.operand),
            *(along.of_logits, base, slope, shift, self.c.E),
            passes=sweep.mode.passes,
        )
        return torch.as_tensor(sums, dtype=torch.float64)

    def add_change(self, out: Gradients) -> None:
        c, G, mode = self.c, self.G, self.sweep.mode
        if out.features is not None:
            out.features.add_(G.exponentials_times(self.sweep.W))
        if out.weight is not None:
            add_weight(out.weight, c.E, c.features, None, mode, G.who[1])  # type: ignore[no-untyped-call]
        if out.bias is not None:
            ones = torch.ones_like(self.sweep.rescale)
            add_weighted_sums(out.bias, c.E, ones, passes=mode.passes, classes=len(out.bias))


class _ByTorch:
    def __init__(self, along: KernelDirection, c: Chunk, dh: Tensor) -> None:
        self.along, self.c, self.dh = along, c, dh
        self.G = along.sweep.torch_gradient(c)
        self.dz = along.change(c, dh)

    def add_gradient(self, out: Gradients) -> None:
        if out.features is not None:
            self.G.add_times(self.along.dW, out.features)
        if out.weight is not None:
            self.G.add_transposed_times(self.dh, out.weight)

    def of_entries(self) -> Tensor:
        return self.dz[self.c.entry_class, self.c.entry_row].double()

    def mean(self) -> Tensor:
        return column_products(self.c.E, self.dz).double() / self.c.mass

    def move(self, base: Tensor, change: RowChange) -> Tensor:
        dz, E = self.dz, self.c.E
        dz.sub_(base).mul_(change.factor.to(dz.dtype)).add_(change.shift.to(dz.dtype))
        return E.mul_(dz).sum(0).double()

    def add_change(self, out: Gradients) -> None:
        add_products(self.c, self.along.sweep.W, out)
