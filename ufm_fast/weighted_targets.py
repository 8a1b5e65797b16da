"""Weighted sparse targets: rows whose target is a distribution over a few classes, of distillation
or of next tokens.

    l_r = sum_k q_rk (logsumexp(z_r) - z_rk),      q_rk > 0 on the row's entries, whose sum Q_r need
    not be 1

They are the target sets of the pick-all loss with a weight for each entry (all ones: the loss
itself, bit for bit), and the problem's kind is 'pick-all weighted', which no form of equally
weighted sets serves. With y the entry of largest weight,

    l_r = Q_r (logsumexp(z_r) - z_ry) + sum_k c_rk z_rk,      c_r = Q_r e_y - q_r,

a cross-entropy of one label a row and a term that is linear in the logits (`backends.weighted`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ufm_fast.targets import Targets


@dataclass(frozen=True)
class WeightedTargets(Targets):
    """``weights`` float64 (entries,), positive: q of each entry of ``indices``; ``indptr`` is
    always there.
    """

    weights: Tensor = field(kw_only=True)

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "weights": self.weights}

    def to(self, device: torch.device | str) -> WeightedTargets:
        assert self.indptr is not None
        return WeightedTargets(
            self.indices.to(device), self.indptr.to(device), weights=self.weights.to(device)
        )

    def part(self, start: int, stop: int) -> WeightedTargets:
        assert self.indptr is not None
        own, first = super().part(start, stop), int(self.indptr[start])
        weights = self.weights[first : first + own.indices.numel()]
        return WeightedTargets(own.indices, own.indptr, weights=weights)

    def entry_rows(self) -> Tensor:
        """Row of each entry, int64 (entries,)."""
        return self.slice(0, self.rows)[0]

    def sums(self) -> Tensor:
        """Q of each row, float64 (R,)."""
        return self.weights.new_zeros(self.rows).index_add_(0, self.entry_rows(), self.weights)

    def leading(self) -> tuple[Tensor, Tensor]:
        """(class of the first entry of largest weight in each row, int64 (R,); c of each entry,
        float64 (entries,)).
        """
        rows, number = self.entry_rows(), self.weights.numel()
        largest = self.weights.new_zeros(self.rows).scatter_reduce(0, rows, self.weights, "amax")
        places = torch.arange(number, device=rows.device).masked_fill(
            self.weights != largest[rows], number
        )
        first = torch.full_like(self.sizes(), number).scatter_reduce(0, rows, places, "amin")
        # Q - q_y as the sum of the others: as a difference it would lose what they are less than it
        others = self.weights.index_fill(0, first, 0.0)
        total = others.new_zeros(self.rows).index_add_(0, rows, others)
        return self.indices[first], (-others).index_add(0, first, total)
