"""Certificates of cross-entropy, with smoothing, and of the pick-all loss: entropies of dual
probabilities.

    cross-entropy, smoothing   LB = sum_r (n_r/N) Entropy(q_r),               q_r = t_r + theta g_r
    pick-all                   LB = sum_r (n_r/N) M_r Entropy(q_r),
                               q_r = (1_S + theta g_r) / M_r

A free bias needs sum_r n_r g_r = 0 exactly, which a rank-one flow from the classes with too much
mass to those with too little restores. Where the logits have an offset or a margin, a_r in all, the
conjugate of the loss changes by the linear term
-<g_r, a_r>, so that the bound gains  theta sum_r (n_r/N) <g_r, a_r>. Scales S of the classes change
the norm alone, that of G S then (`adjustments`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ufm_fast.backends.sweep import Chunk
from ufm_fast.backends.tiled import TiledSoftmaxHead
from ufm_fast.losses import SoftmaxLoss
from ufm_fast.memory import available_bytes, out_of_memory
from ufm_fast.theory.certificates.base import Candidate, Proof, theta


def softmax(candidate: Candidate) -> Proof:
    """The bound of cross-entropy and pick-all, any bias."""
    dual = SoftmaxDual(candidate)
    norm = candidate.norm(dual)
    return candidate.proof(dual.lower_bound(theta(norm, candidate.mu)), norm)


class SoftmaxDual:
    """The scaled gradient of a softmax loss, and the bound that its rows prove where g(l) = l (the
    entropies).
    """

    limit = 1.0  # of theta
    of_targets: Tensor | None = None  # factors on the target entries, (R,), of single labels

    def __init__(self, candidate: Candidate) -> None:
        problem, head = candidate.problem, candidate.head
        assert isinstance(problem.loss, SoftmaxLoss)
        self.problem, self.head, self.loss, self.swept = (
            problem,
            head,
            problem.loss,
            TiledSoftmaxHead(),
        )
        self.adjustment = problem.adjustment.to(head.weight.device)
        self.N, self.spread = problem.num_samples, candidate.spread
        self.root, self.scale = candidate.root, candidate.scale
        K = head.weight.shape[0]
        self.column_sum = torch.zeros(K, dtype=torch.float64, device=head.weight.device)
        self.out_flow = torch.zeros_like(
            self.column_sum
        )  # taken from each target entry of a class, per sample
        self.in_flow = torch.zeros_like(
            self.column_sum
        )  # and shared out over the classes by these shares
        self.level_flow = torch.zeros_like(self.column_sum)  # taken from each row alike
        if problem.bias != "none":
            for c, G in self._gradients():
                self.column_sum += self.head.row_weight[c.start : c.stop] @ G
            self.column_sum = self.spread.total(self.column_sum)
        if problem.bias == "free":
            self._balance()
        self.drop = candidate.bias_drop(self.column_sum)

    def _balance(self) -> None:
        surplus, deficit = self.column_sum.clamp_min(0.0), (-self.column_sum).clamp_min(0.0)
        if float(surplus.sum()) == 0.0:
            return
        counts = self.problem.counts.to(surplus.device)
        # An empty class has no target entries; smoothing has put eps / K everywhere, so every row
        # gives the same.
        self.level_flow = torch.where(counts == 0, surplus, 0.0)
        # sum_r n_r g_r / N must vanish; the two sides differ by rounding, so the shares are of the
        # surplus itself.
        self.out_flow = torch.where(counts == 0, 0.0, surplus * self.N / counts.clamp_min(1))
        # Rounding may leave every sum positive at an optimum: then any shares do.
        short = float(deficit.sum()) > 0.0
        self.in_flow = (
            deficit / deficit.sum() if short else torch.full_like(deficit, 1.0 / deficit.numel())
        )
        for c, G in self._gradients():
            self._limit_theta(c, G)
            if bool(self.level_flow.any()):
                floor = self.loss.smoothing / surplus.numel()
                self.limit = min(self.limit, floor / max(float(-G[:, counts == 0].min()), floor))
        self.limit = self.spread.least(self.limit)

    def _limit_theta(self, c: Chunk, G: Tensor) -> None:
        """theta may not push a target's probability below zero: 1_S + theta g >= 0 on targets,
        ``level`` being 1_S.
        """
        level = 1.0 - self.loss.smoothing * (G.shape[1] - 1) / G.shape[1]
        worst = float((-G[c.entry_row, c.entry_class]).max())
        self.limit = min(self.limit, level / max(worst, level))

    def _flow(self, c: Chunk) -> Tensor:
        """c_r, what the gradient of a row moves from its targets to the other classes."""
        return c.p * c.M

    def _gradients(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Chunks with the dense per-sample gradient g (C x K), the balancing flow included."""
        K = self.head.weight.shape[0]
        for c in self.swept.sweep(self.head):
            flow = self._flow(c)
            G = c.E.T * (flow / c.mass)[:, None]
            if self.loss.smoothing:
                G -= self.loss.smoothing / K
            entry = -flow[c.entry_row] + self.loss.smoothing * (K - 1) / K
            if self.loss.multi_label:
                # (1 - p) M share - 1, whose two parts keep their digits where one target has nearly
                # all the mass
                whole = c.M[c.entry_row] * c.entry_share
                entry = (whole - 1.0) - c.p[c.entry_row] * whole
            taken = self.out_flow[c.entry_class]
            G[c.entry_row, c.entry_class] = entry - taken
            if self.problem.bias == "free":
                G -= self.level_flow
                total = (
                    torch.zeros_like(c.p)
                    .index_add_(0, c.entry_row, taken)
                    .add_(self.level_flow.sum())
                )
                G.addr_(total, self.in_flow)
            yield c, G

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of the scaled gradient, of rows n_r / (N sqrt(w_r)) g_r S; w_r is what the row
        weighs in the penalty.
        """
        for c, G in self._gradients():
            if self.of_targets is not None:
                G[c.entry_row, c.entry_class] *= self.of_targets[c.start : c.stop]
            block = G * self.root[c.start : c.stop, None]
            yield block if self.scale is None else block * self.scale

    @cached_property
    def _held(self) -> Tensor | None:
        """The scaled gradient (R x K) where there is room for it: more than a hundred products with
        it follow.
        """
        R, K = self.root.numel(), self.head.weight.shape[0]
        if not held_bytes(R, K, available_bytes(self.root.device)):
            return None
        try:
            held = self.root.new_empty(R, K)
        except RuntimeError as error:  # what was free a moment ago is not: sweep instead
            if not out_of_memory(error):
                raise
            return None
        start = 0
        for block in self.blocks():
            held[start : start + len(block)] = block
            start += len(block)
        return held

    def forward(self, X: Tensor) -> Tensor:
        if self._held is not None:
            return self._held @ X
        return torch.cat([X.new_zeros(0, X.shape[1]), *(block @ X for block in self.blocks())])

    def adjoint(self, Y: Tensor) -> Tensor:
        if self._held is not None:
            return self.spread.total(self._held.T @ Y)
        total = torch.zeros(self.head.weight.shape[0], Y.shape[1], dtype=Y.dtype, device=Y.device)
        start = 0
        for block in self.blocks():
            total.addmm_(block.T, Y[start : start + len(block)])
            start += len(block)
        return self.spread.total(total)

    def lower_bound(self, theta: float) -> float:
        theta = min(theta, self.limit)
        total = 0.0
        for c, G in self._gradients():
            weight = self.head.row_weight[c.start : c.stop]
            if self.adjustment:
                total += theta * float(weight @ self.adjustment.constant(G, c.entry_class))
            total += float(weight @ self._row_bounds(c, G, theta))
        return self.spread.number(total) - theta**2 * self.drop

    def _row_bounds(self, c: Chunk, G: Tensor, theta: float) -> Tensor:
        """M Entropy(q) of each row."""
        K = G.shape[1]
        g = G[c.entry_row, c.entry_class]
        G.mul_((theta / c.M)[:, None])
        if self.loss.smoothing:
            G += self.loss.smoothing / K
        G[c.entry_row, c.entry_class] = 0.0
        rows = torch.special.entr(G.clamp_min_(0.0)).sum(1)
        if self.loss.multi_label:
            # -q log q with q = (1 + x) / M: near q = 1 the logarithm keeps its digits.
            x, M = (theta * g).clamp_min(-1.0), c.M[c.entry_row]
            own = torch.where(x > -1.0, (1.0 + x) / M * (M.log() - torch.log1p(x)), 0.0)
        else:
            own = entropy_beside(self.loss.smoothing * (K - 1) / K - theta * g)
        total: Tensor = rows.index_add(0, c.entry_row, own)
        return c.M * total


def entropy_beside(rest: Tensor) -> Tensor:
    """-q log q of q = 1 - rest, with the digits of a rest that is small; beyond [0, 1] it is taken
    at the end.
    """
    x = rest.clamp(0.0, 1.0)
    far = -torch.xlogy(1.0 - x, 1.0 - x)
    return torch.where(x < 0.5, -(1.0 - x) * torch.log1p(-x), far)


def held_bytes(rows: int, classes: int, free_bytes: int) -> int:
    """Bytes of the scaled gradient that a probabilistic certificate holds: up to a quarter of the
    free memory, else none.
    """
    size = 8 * rows * classes
    return size if size <= free_bytes // 4 else 0
