"""Certificates of the pick-all loss of weighted sets, any bias: distributions q_r over a few
classes, of sum Q_r.

    LB = sum_r (n_r/N) Q_r Entropy((q_r + theta g_r) / Q_r),      g_r = Q_r p_r - q_r

As for sets (`softmax`), of which this is the case of other weights than one; so offsets, scales and
penalties of each class enter as there, and layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.sweep import Chunk
from ufm_fast.backends.weighted import one_label
from ufm_fast.theory.certificates.base import Candidate, Proof, theta
from ufm_fast.theory.certificates.softmax import SoftmaxDual, entropy_beside
from ufm_fast.weighted_targets import WeightedTargets


def weighted_sets(candidate: Candidate) -> Proof:
    """The bound of weighted sets."""
    dual = _WeightedDual(candidate)
    norm = candidate.norm(dual)
    return candidate.proof(dual.lower_bound(theta(norm, candidate.mu)), norm)


class _WeightedDual(SoftmaxDual):
    """Sweeps the cross-entropy of the leading labels, and makes the sets' gradient of its."""

    def __init__(self, candidate: Candidate) -> None:
        targets = candidate.head.targets
        assert isinstance(targets, WeightedTargets)
        self.targets, self.sums, self.pull = targets, targets.sums(), targets.leading()[1]
        #: Q less the largest weight, of each row
        self.others = torch.zeros_like(self.sums).index_add_(
            0, targets.entry_rows(), self.pull.clamp_min(0.0)
        )
        self.plain = replace(one_label(candidate.head), row_weight=candidate.head.row_weight)
        super().__init__(candidate)

    def _entries(self, c: Chunk) -> tuple[Tensor, Tensor, slice]:
        """(row in the chunk, class) of its entries, and which of all they are."""
        assert self.targets.indptr is not None
        part = slice(int(self.targets.indptr[c.start]), int(self.targets.indptr[c.stop]))
        return (*self.targets.slice(c.start, c.stop), part)

    def _gradients(self) -> Iterator[tuple[Chunk, Tensor]]:
        for c in self.swept.sweep(self.plain):
            G = c.E.T * (c.p / c.mass)[:, None]
            G[
                c.entry_row, c.entry_class
            ] = -c.p  # p - e_y, with the digits of a row that is nearly sure
            G *= self.sums[c.start : c.stop, None]
            rows, classes, part = self._entries(c)
            taken = self.out_flow[classes]
            G.index_put_((rows, classes), self.pull[part] - taken, accumulate=True)
            if self.problem.bias == "free":
                G -= self.level_flow
                G.addr_(
                    torch.zeros_like(c.p).index_add_(0, rows, taken).add_(self.level_flow.sum()),
                    self.in_flow,
                )
            yield c, G

    def _limit_theta(self, c: Chunk, G: Tensor) -> None:
        rows, classes, part = self._entries(c)
        q = self.targets.weights[part]
        self.limit = min(self.limit, float((q / torch.maximum(-G[rows, classes], q)).min()))

    def _row_bounds(self, c: Chunk, G: Tensor, theta: float) -> Tensor:
        rows, classes, part = self._entries(c)
        total, leading = self.sums[c.start : c.stop], (c.entry_row, c.entry_class)
        rest = (self.others[c.start : c.stop] - theta * G[leading]) / total
        G.mul_(theta).index_put_((rows, classes), self.targets.weights[part], accumulate=True)
        G[leading] = 0.0
        entropy = torch.special.entr(G.div_(total[:, None]).clamp_min_(0.0)).sum(1)
        found: Tensor = total * (entropy + entropy_beside(rest))
        return found
