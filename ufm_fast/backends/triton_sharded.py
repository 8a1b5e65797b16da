"""A rank's part of the sharded softmax head by the kernels of ufm_kernels: float32 and half
precision, on CUDA.

The kernels make E of a chunk of rows and this place's classes, and multiply it; everything between,
and all that ranks say to one another, is that of `sharded_sweep`. So a rank may multiply by kernels
where another one uses torch, as it does where a chunk has more than ``MAX_TARGETS`` targets in a
row or where it has no classes. Precisions are those of `triton`, and products of E as it was
rounded are rescaled row by row, each rank's by its own sums: then a row of the gradient sums to
zero over all ranks.

Hessian products are torch's (`ShardedSweep`): what the kernels' own would tell other ranks between
its passes is not written. Targets' logits that rounding alone tells from the largest other one are
made level with it on the rank that has the target's class, not with those of other ranks.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput, HeadPlan, HeadShape
from ufm_fast.backends.exponentials import Exponentials
from ufm_fast.backends.logit_gradient import ChunkGradient
from ufm_fast.backends.sharded_sweep import ShardedSweep
from ufm_fast.backends.sweep import Chunk, Entries
from ufm_fast.backends.triton_labels import MAX_TARGETS
from ufm_fast.backends.triton_memory import SOFTMAX_MODE, planned_rows, softmax_plan
from ufm_fast.errors import InputError
from ufm_kernels.head_parts import add_weight, band_of, who_multiplies
from ufm_kernels.library import library_product
from ufm_kernels.off_target import off_target
from ufm_kernels.operands import empty_chunk, mode_named, operand, product_operand
from ufm_kernels.products import add_product, add_weighted_sums

#: Sums of exponentials beyond which a row takes its largest logit as the offset.
_SAFE = 2.0**40


def mode_of(dtype: torch.dtype) -> str:
    """The precision of a head of that dtype. Errors: InputError where the kernels have none."""
    if dtype not in SOFTMAX_MODE:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"backend sharded-triton has no {name} kernels; use backend sharded-tiled for {name}, "
            f"or dtype float32"
        )
    return SOFTMAX_MODE[dtype]


class KernelSweep(ShardedSweep):
    """A pass whose exponentials the kernels make and multiply."""

    @staticmethod
    def rows_of_chunk(x: HeadInput, rows: int, classes: int, buffers: int) -> int:
        mode, columns = mode_of(x.weight.dtype), x.features.shape[1]
        return planned_rows(rows, columns, classes, mode, x.weight.device, one_pass=False)

    @staticmethod
    def plan(shape: HeadShape, chunk: int | None) -> HeadPlan:
        """What this rank takes for a head of its classes and all rows of its place."""
        usual = ShardedSweep.plan(shape, chunk)
        rows, work, _ = softmax_plan(
            shape.rows, shape.dim, shape.classes, shape.dtype, shape.device
        )
        return replace(usual, chunk=rows, workspace=work, kept=0, passes=0.0)

    def _empty(self, rows: int) -> Tensor:
        self.name = mode_of(self.x.weight.dtype)
        self.mode = mode_named(self.name)
        self._right: tuple[Tensor, Tensor, bool] | None = None
        if not len(self.W):
            return self.W.new_empty(0, rows)
        self._operand = operand(self.W, self.mode.logits, self.mode.passes)
        self._offsets = None if self.bias is None else self.bias.float().contiguous()
        return empty_chunk(rows, len(self.W), self.mode, self.W.device)

    def _exponentials(self, h: Tensor, guess: Tensor, mine: Entries, z: Tensor) -> Exponentials:
        labels = _padded(mine) if len(self.W) else None
        self.kernels = labels is not None
        if labels is None:
            return self._by_torch(h, guess, mine, z)
        H, offset = operand(h, self.mode.logits, self.mode.passes), guess.float()
        mass, kept, top = self._swept(H, offset, labels)
        hostile = (~((mass < _SAFE) & (mass > 1 / _SAFE))) & (top > -torch.inf)
        if bool(hostile.any()):
            offset = torch.where(hostile, top.float(), offset)
            mass, kept, top = self._swept(H, offset, labels)
        self.rescale = torch.where(kept > 0, mass / kept.where(kept > 0, 1.0), 1.0).float()
        others, band = top[mine.rows], band_of(H, self.mode)
        rounded = torch.where((z - others).abs() <= band * z.abs(), others, z)
        return Exponentials(mass, offset.double(), top if self.statistics else None, rounded)

    def _by_torch(self, h: Tensor, guess: Tensor, mine: Entries, z: Tensor) -> Exponentials:
        """The same into a buffer of torch's, for this chunk."""
        kept, self.buffer = self.buffer, ShardedSweep._empty(self, len(h))
        try:
            return super()._exponentials(h, guess, mine, z)
        finally:
            self.by_torch, self.buffer = self.buffer, kept

    def _swept(self, H: Tensor, offset: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fill E; its row sums, those of E as it was rounded, and the largest logits off target,
        float64.
        """
        statistics = off_target(
            H,
            self._operand,
            self._offsets,
            offset,
            labels,
            self.buffer,
            passes=self.mode.passes,
            classes=len(self.W),
        )
        mass, kept = statistics[:2].double().sum(1)
        return mass, kept, statistics[2].amax(0).double()

    def gradient(self, c: Chunk) -> ChunkGradient:
        if self.kernels:
            return _KernelGradient(self, c)
        c.E = self.by_torch
        return super().gradient(c)

    def spends(self, out: Gradients) -> bool:
        return False

    def right_of(self, right: Tensor, who: str) -> tuple[Tensor, bool]:
        """A matrix (K, c) as the second factor of a product with E, and whether it lies that way;
        the last one is remembered.
        """
        if self._right is None or self._right[0] is not right:
            mode, library = self.mode, who == "library"
            prepared = (
                (operand(right, mode.products, mode.passes), True)
                if library
                else product_operand(right, mode)
            )
            self._right = (right, *prepared)
        return self._right[1:]


class _KernelGradient(ChunkGradient):
    """The gradient in the logits of a chunk whose E is as the kernels store it, (rows, halves x
    width).
    """

    def __init__(self, sweep: KernelSweep, chunk: Chunk) -> None:
        super().__init__(sweep.loss, chunk, torch.float32)
        self.sweep, self.mode = sweep, sweep.mode
        self.of_rows = (self.factor * sweep.rescale).contiguous()
        self.who = who_multiplies(None, sweep.name, chunk.features)

    def add_class_sums(self, out: Tensor) -> None:
        add_weighted_sums(
            out, self.chunk.E, self.of_rows, passes=self.mode.passes, classes=len(out)
        )
        self.add_entry_sums(out)

    def add_times(self, right: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        E, classes, passes = self.chunk.E, len(right), self.mode.passes
        if fresh:
            out.zero_()
        V, down = self.sweep.right_of(right, self.who[0])
        if self.who[0] == "library":
            product = library_product(E[:, :classes], V[:, : right.shape[1]])
            out.addcmul_(product, self.of_rows[:, None])
        else:
            add_product(out, E, V, passes=passes, depth=classes, down=down, factor=self.of_rows)
        self.add_entry_times(right, out)
        self.add_even_times(right, out)

    def add_transposed_times(self, left: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        if fresh:
            out.zero_()
        E, who = self.chunk.E, self.who[1]
        add_weight(out, E, left, self.of_rows, self.mode, who)  # type: ignore[no-untyped-call]
        self.add_entry_transposed(left, out)
        self.add_even_transposed(left, out)


def _padded(mine: Entries) -> Tensor | None:
    """The targets of rows that are classes here, (rows, T) int32, padded with -1; None where T is
    too large.
    """
    rows = mine.rows
    place = torch.arange(rows.numel(), device=rows.device) - torch.searchsorted(rows, rows)
    widest = int(place.max()) + 1 if rows.numel() else 1
    if widest > MAX_TARGETS:
        return None
    labels = torch.full((mine.number, widest), -1, dtype=torch.int32, device=rows.device)
    labels[rows, place] = mine.classes.int()
    return labels
