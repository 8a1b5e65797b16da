"""A rank's part of the sharded softmax head by the kernels of ufm_kernels: float32 and bfloat16,
on CUDA.

The kernels make E of a chunk of rows and this place's classes, and multiply it; everything between,
and all that ranks say to one another, is that of `sharded_sweep`. So a rank may multiply by kernels
where another one uses torch, as it does where a chunk has more than ``MAX_TARGETS`` targets in a
row or where it has no classes. Precisions are those of `triton`, and products of E as it was
rounded are rescaled row by row, each rank's by its own sums: then a row of the gradient sums to
zero over all ranks.

A target's logit that rounding alone tells from the largest other one is made level with it, as in
one process. That one may be on another rank, and a largest number can't come with the message of
sums; so where that message tells that a target of the chunk is not far from the others, one more
goes round. Near collapse none is. Hessian products are `triton_hessian`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput, HeadPlan, HeadShape
from ufm_fast.backends.exponentials import Exponentials, near_others
from ufm_fast.backends.logit_gradient import ChunkGradient
from ufm_fast.backends.sharded_hessian import Direction
from ufm_fast.backends.sharded_sweep import ShardedSweep
from ufm_fast.backends.sweep import Chunk, Entries
from ufm_fast.backends.triton_hessian import KernelDirection
from ufm_fast.backends.triton_labels import MAX_TARGETS
from ufm_fast.backends.triton_memory import SOFTMAX_MODE, planned_rows, softmax_plan
from ufm_fast.errors import InputError
from ufm_kernels.head_parts import add_weight, band_of, who_multiplies
from ufm_kernels.library import library_product
from ufm_kernels.off_target import off_target
from ufm_kernels.operands import (
    empty_chunk,
    mode_named,
    operand,
    operand_width,
    product_operand,
)
from ufm_kernels.products import add_product, add_weighted_sums

#: The precisions of the dtypes that a problem may have.
_MODES = {dtype: SOFTMAX_MODE[dtype] for dtype in (torch.float32, torch.bfloat16)}
#: Sums of exponentials beyond which a row takes its largest logit as the offset.
_SAFE = 2.0**40


def mode_of(dtype: torch.dtype) -> str:
    """The precision of a head of that dtype. Errors: InputError where the kernels have none."""
    if dtype not in _MODES:
        name = str(dtype).removeprefix("torch.")
        raise InputError(
            f"backend sharded-triton has no {name} kernels; use backend sharded-tiled for {name}, "
            f"or dtype float32"
        )
    return _MODES[dtype]


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
        rows, first, second = softmax_plan(
            shape.rows, shape.dim, shape.classes, shape.dtype, shape.device
        )
        return HeadPlan(rows, first, second, usual.flops)

    def _empty(self, rows: int) -> Tensor:
        self.name = mode_of(self.x.weight.dtype)
        self.mode = mode_named(self.name)
        self._rights: list[tuple[Tensor, Tensor, bool]] = []
        if not len(self.W):
            return self.W.new_empty(0, rows)
        self.operand = operand(self.W, self.mode.logits, self.mode.passes)
        self._offsets = None if self.bias is None else self.bias.float().contiguous()
        return empty_chunk(rows, len(self.W), self.mode, self.W.device)

    def _exponentials(self, h: Tensor, guess: Tensor, mine: Entries, z: Tensor) -> Exponentials:
        labels = _padded(mine) if len(self.W) else None
        self.kernels = labels is not None
        if labels is None:
            return self._by_torch(h, guess, mine, z)
        self.rows_operand = H = operand(h, self.mode.logits, self.mode.passes)
        offset = guess.float()
        mass, kept, top = self._swept(H, offset, labels)
        hostile = (~((mass < _SAFE) & (mass > 1 / _SAFE))) & (top > -torch.inf)
        if bool(hostile.any()):
            offset = torch.where(hostile, top.float(), offset)
            mass, kept, top = self._swept(H, offset, labels)
        self.rescale = torch.where(kept > 0, mass / kept.where(kept > 0, 1.0), 1.0).float()
        return Exponentials(mass, offset.double(), top, z)

    @property
    def tops(self) -> bool:
        return True

    def _compared(
        self,
        z: Tensor,
        rounded: Tensor,
        others: tuple[Tensor, Tensor],
        top: Tensor | None,
        entries: Entries,
    ) -> tuple[Tensor, Tensor | None]:
        mass, offset = others
        # Of all ranks' numbers, so the same on each.
        near = self.statistics or bool(near_others(z, entries.of_rows(mass.log() + offset)).any())
        if not near:
            return rounded, None
        _, top = super()._compared(z, rounded, others, top, entries)
        assert top is not None
        width = operand_width(self.x.features.shape[1], self.mode.logits, self.mode.passes)
        largest, band = entries.of_rows(top), band_of(width, self.mode)
        level = z.isfinite() & ((z - largest).abs() <= band * z.abs())
        return torch.where(level, largest, rounded), top if self.statistics else None

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
            self.operand,
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
        return self.kernel_gradient(c) if self.kernels else self.torch_gradient(c)

    def kernel_gradient(self, c: Chunk) -> KernelGradient:
        return KernelGradient(self, c)

    def torch_gradient(self, c: Chunk) -> ChunkGradient:
        c.E = self.by_torch
        return super().gradient(c)

    def along(self, v: HeadInput) -> Direction:
        return KernelDirection(self, v)

    def spends(self, out: Gradients) -> bool:
        return False

    def right_of(self, right: Tensor, who: str) -> tuple[Tensor, bool]:
        """A matrix (K, c) as the second factor of a product with E, and whether it lies that way;
        the last two are remembered.
        """
        for matrix, prepared, down in self._rights:
            if matrix is right:
                return prepared, down
        mode = self.mode
        prepared, down = (
            (operand(right, mode.products, mode.passes), True)
            if who == "library"
            else product_operand(right, mode)
        )
        self._rights = [*self._rights[-1:], (right, prepared, down)]
        return prepared, down


class KernelGradient(ChunkGradient):
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
        if fresh:
            out.zero_()
        self.add_scaled(self.exponentials_times(right), right, out)

    def exponentials_times(self, right: Tensor) -> Tensor:
        """E right, for what stands in E."""
        E, classes, mode = self.chunk.E, len(right), self.mode
        V, down = self.sweep.right_of(right, self.who[0])
        if self.who[0] == "library":
            return library_product(E[:, :classes], V[:, : right.shape[1]])
        product = torch.zeros(len(E), right.shape[1], device=E.device)
        add_product(product, E, V, passes=mode.passes, depth=classes, down=down)
        return product

    def add_scaled(self, product: Tensor, right: Tensor, out: Tensor) -> None:
        """out += G right, from ``product`` = E right."""
        out.addcmul_(product, self.of_rows[:, None])
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
