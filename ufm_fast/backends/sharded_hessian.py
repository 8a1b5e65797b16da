"""What a chunk of rows adds to a Hessian product of the sharded softmax head, along a direction in
features, classes and biases; by torch. `triton_hessian` has it by kernels.

Three sums go over the class axis, one number a row each: the targets' mean change, the mean change
under the exponentials, and what rounding leaves of that once it has been taken off
(`logit_gradient`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ufm_fast.backends.base import Gradients, HeadInput
from ufm_fast.backends.logit_gradient import add_change
from ufm_fast.backends.sweep import Chunk

if TYPE_CHECKING:
    from ufm_fast.backends.sharded_sweep import ShardedSweep


class Direction:
    """A direction in W and b, of the classes of this place: ``dW`` and ``db``."""

    def __init__(self, sweep: ShardedSweep, v: HeadInput) -> None:
        self.sweep, self.dW = sweep, sweep.group(v.weight)
        self.db = None if v.bias is None else sweep.group(v.bias)
        self._change: Tensor | None = None

    def add(self, c: Chunk, dh: Tensor, out: Gradients) -> None:
        """Add the products of the chunk that was made last, whose features move along ``dh``; its
        E is overwritten.
        """
        dz, G = self.change(c, dh), self.sweep.with_tilt(c)
        if out.features is not None:
            G.add_times(self.dW, out.features)
        if out.weight is not None:
            G.add_transposed_times(dh, out.weight)
        add_change(self.sweep.loss, c, self.sweep.W, dz, out)

    def change(self, c: Chunk, dh: Tensor) -> Tensor:
        """That of the chunk's logits, K x C, in a buffer for the next ones."""
        if self._change is None:
            self._change = dh.new_empty(len(self.dW), len(dh))
        dz = torch.mm(self.sweep.W, dh.T, out=self._change)
        dz.addmm_(self.dW, c.features.T)
        return dz if self.db is None else dz.add_(self.db[:, None])
