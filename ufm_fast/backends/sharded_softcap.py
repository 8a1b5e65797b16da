"""Cross-entropy of capped logits  q = cap tanh(z / cap)  over the ranks of a mesh.

Chunks of rows go round as in `sharded`, and so do the sums a row; only what a chunk holds differs:
exponentials of q relative to the row's largest here, and beside them q itself, of which the
gradient in z is G J and its change J dG - (2 q / cap^2) J G dz, with J = 1 - (q / cap)^2 and G, dG
those in q (`softcap`). Four arrays of a chunk's size live at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadByLoss, HeadInput
from ufm_fast.backends.exponentials import Exponentials, from_largest
from ufm_fast.backends.logit_gradient import ChunkGradient, add_products, changed
from ufm_fast.backends.sharded import ShardedSoftmaxHead
from ufm_fast.backends.sharded_hessian import Direction
from ufm_fast.backends.sharded_sweep import ShardedSweep
from ufm_fast.backends.sweep import Chunk, Entries
from ufm_fast.layout import Mesh
from ufm_fast.losses import CrossEntropy, SoftmaxLoss

_ARRAYS = 4


@dataclass(frozen=True)
class CappedCrossEntropy(CrossEntropy):
    """The cross-entropy of capped logits, for this backend alone: no loss of the solver's table."""

    cap: float = 30.0


class ShardedSoftcapBackend(HeadByLoss):
    """The interface of ``Backend`` for `CappedCrossEntropy` of one label a row, of inputs with a
    layout.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.name = "sharded-softcap"
        super().__init__((CappedCrossEntropy, ShardedSoftmaxHead(mesh, kind=SoftcapSweep)))


class SoftcapSweep(ShardedSweep):
    """The chunks of capped logits."""

    capped: Tensor  # q of the chunk that was made last, K x C

    @property
    def cap(self) -> float:
        assert isinstance(self.loss, CappedCrossEntropy)
        return self.loss.cap

    @staticmethod
    def rows_of_chunk(x: HeadInput, rows: int, classes: int, buffers: int) -> int:
        return ShardedSweep.rows_of_chunk(x, rows, classes, _ARRAYS * buffers)

    def bent(self, z: Tensor) -> Tensor:
        return self.cap * torch.tanh(z / self.cap)

    def _exponentials(self, h: Tensor, guess: Tensor, mine: Entries, z: Tensor) -> Exponentials:
        if self.W.shape[0] == 0:
            self.capped = self.buffer
            return super()._exponentials(h, guess, mine, z)
        logits = torch.mm(self.W, h.T)
        if self.bias is not None:
            logits.add_(self.bias.to(logits.dtype)[:, None])
        self.capped = self.bent(logits)
        E = self.buffer.copy_(self.capped)
        rounded = E[mine.classes, mine.rows].double()
        mass, largest = from_largest(E, mine.rows, mine.classes)
        return Exponentials(mass, largest, largest if self.tops else None, rounded)

    def jacobian(self) -> Tensor:
        """dq / dz of the chunk."""
        return 1.0 - (self.capped / self.cap).square_()

    def gradient(self, c: Chunk) -> ChunkGradient:
        return _CappedGradient(self.loss, c, self.jacobian())

    def along(self, v: HeadInput) -> Direction:
        return _CappedDirection(self, v)


class _CappedGradient(ChunkGradient):
    """G J, made at once, in an array of its own."""

    def __init__(self, loss: SoftmaxLoss, c: Chunk, jacobian: Tensor) -> None:
        super().__init__(loss, c)
        G = c.E * self.factor
        G[c.entry_class, c.entry_row] = self.entry
        self.chunk, self.stored = replace(c, E=G.mul_(jacobian)), True

    def store(self, class_sums: Tensor | None) -> None:
        if class_sums is not None:
            self.add_class_sums(class_sums)

    def add_class_sums(self, out: Tensor) -> None:
        out.add_(self.chunk.E.sum(1))


class _CappedDirection(Direction):
    sweep: SoftcapSweep

    def add(self, c: Chunk, dh: Tensor, out: Gradients) -> None:
        sweep = self.sweep
        dz, G, J = self.change(c, dh), sweep.gradient(c), sweep.jacobian()
        if out.features is not None:
            G.add_times(self.dW, out.features)
        if out.weight is not None:
            G.add_transposed_times(dh, out.weight)
        bend = G.chunk.E.mul_(sweep.capped).mul_(dz).mul_(2.0 / sweep.cap**2)
        entries = changed(sweep.loss, c, dz.mul_(J))
        c.E[c.entry_class, c.entry_row] = entries.to(c.E.dtype)
        c.E.mul_(J).sub_(bend)
        add_products(c, sweep.W, out)
