"""A preconditioner and a gauge for softmax losses with one row for each class and d >= K: L-BFGS in
tens of steps.

In the balanced variables the penalty's curvature mu and the logit gradient's coupling -mu between A
and B cancel along "A and B move together", so that direction is as flat as the data term there, a
few thousand times less than mu when K is large: that is what makes the problem slow. With the right
basis of R^d (the gauge, free because f(AQ, BQ) = f(A, B)) both factors are nearly diagonal, A ~ B ~
diag(s), the logit gradient is nearly -mu I, and the Hessian falls apart into 2 x 2 blocks.
For i != j let  x1 = (A_ij, B_ji),  x2 = (B_ij, A_ji),  v = (s_j, s_i),  q = |v|^2, and let h_i be
the curvature of row i's loss in one off-target logit. Then the block is

    along v          [[h_i q + mu, -mu], [-mu, h_j q + mu]]
    across v         mu [[1, -1], [-1, 1]], whose null vector is the rotation of i into j: the
                     gauge. It gets mu/2 as well.

The inverse costs O(K^2): nothing beside a gradient. (Our derivation; measured below.)

Decisions

2026-11-25. L-BFGS gets a paired preconditioner in a fixed gauge (`solvers/curvature/pairs.py`).
Where every class has a row, d >= K and no class is near its collapse threshold, the Hessian of a
softmax loss nearly splits into 4 x 4 blocks once R^d is rotated so that A + B is symmetric positive
semidefinite. Its inverse costs O(K^2). Evaluations on cross-entropy with counts log-spaced 1..500,
K = 200, d = 256, to a relative gradient of 3e-10 (`bench/reasons/preconditioner.py`, results beside
it; the identity's vary by a few with the number of threads):

| Hessian model, pairs | spectral start | random start |
| --- | --- | --- |
| identity, 10 | 158 | 217 |
| identity, 20 | 157 | 222 |
| paired, 5 | 52 | 61 |
| paired, 10 (the default) | 50 | 58 |
| paired, 20 | 51 | 58 |

Tried and dropped: the same blocks with the gauge direction left near zero instead of mu/2, and
blocks in the singular bases of Z instead of the class basis (where the targets' own curvature is
not diagonal), both slower than no model; a model with the coupling of collapsed classes put in,
which below the threshold needs four times the identity's steps. So `applicable` asks for
sqrt(n_k)/N >= 2 mu.

2026-11-25. From a random start, one proximal gradient step on the convex problem in Z = A B' comes
first (`gauge.lifted_step`), while some class is not yet separated; then each class's rows are
scaled to the logit gap of its count. Without that scaling the levels of the classes, not their
directions, are what the solver spends its steps on; more proximal steps or a second gauge were
tried in its place and saved less.

2026-11-30. On several ranks a product with the model exchanges the K x K parts of a gradient once,
for rows of their transposes: a rank of P sends 2 (K - K/P) K/P numbers, and there are two products
a step. The proximal step and the gauge (`gauge`) are singular value decompositions of K x K and K x
d matrices, made once, to begin with, as in one process: each rank gathers W and H for them, no more
than two d x d matrices, and so up to d = 4,096 alone. Forty classes of 1 to 34 samples, d = 48,
lambda = 5e-5: 41 evaluations in one process, on one rank and on two, where the identity took 110
(`python -m bench rank_models`, torch 2.13.0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.layout import transposed
from ufm_fast.losses import SoftmaxLoss
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.curvature.base import Built
from ufm_fast.solvers.curvature.gauge import classes_here, fix_gauge, lifted_step
from ufm_fast.spread import Spread

#: Dimensions up to which ranks have a preconditioner: to begin, each has both factors as a whole.
_WHOLE = 4096


@dataclass(frozen=True)
class PairPreconditioner:
    """Inverse of the block model. ``s``, ``h`` (K,): diagonal of the factors, curvature of an
    off-target logit by row, of all classes; ``here``: which of them this rank has.
    """

    s: Tensor
    h: Tensor
    mu: float
    bias: Tensor | None
    here: slice

    @classmethod
    def build(cls, objective: Objective, x: Point, evaluation: Evaluation) -> PairPreconditioner:
        """From the row statistics of ``evaluation`` at ``x`` (a point in the gauge of
        ``fix_gauge``).
        """
        problem = objective.problem
        assert isinstance(problem.loss, SoftmaxLoss)
        assert evaluation.statistics is not None
        K = problem.num_classes
        u = evaluation.statistics.log_off_target_mass
        l, p = torch.nn.functional.softplus(u), torch.sigmoid(u)
        scales, here = objective.scales, classes_here(objective)
        slope, unit, s = (
            Spread(objective.layout, "curvature").whole(part)
            for part in (
                objective.row_weight
                * (problem.loss.weight(l, p).abs() * p + problem.loss.smoothing),
                scales.logits[:, 0].double(),
                0.5 * (x.W[:, here].diagonal() + x.H[:, here].diagonal()).double(),
            )
        )
        h = slope / (K - 1) * unit.square()
        floor = 1e-2 * s.abs().max().clamp_min(1e-12)
        bias = (
            None
            if x.b is None
            else (slope + slope.sum() / K)[here] * scales.bias**2 + scales.penalties.bias
        )
        return cls(s.clamp_min(float(floor)), h, problem.mu, bias, here)

    def apply(self, g: Point) -> Point:
        """Preconditioner times a gradient, a block of rows at a time: the dozen passes over a block
        stay in the cache.
        """
        K, here, layout = self.s.numel(), self.here, g.layout
        a, b = g.H[:, :K], g.W[:, :K]
        aT, bT = (a.T, b.T) if layout is None else (transposed(layout, x) for x in (a, b))
        H, W = g.H / (2 * self.mu), g.W / (2 * self.mu)
        s, h = self.s.to(a.dtype), self.h.to(a.dtype)
        height = max(1, (1 << 16) // K)
        for start in range(0, len(a), height):
            rows = slice(start, min(start + height, len(a)))
            classes = slice(here.start + rows.start, here.start + rows.stop)
            H[rows, :K], W[rows, :K] = self._block(
                a[rows], bT[rows], b[rows], aT[rows], s, h, classes
            )
        self._diagonal(H[:, here], W[:, here], a[:, here].diagonal(), b[:, here].diagonal())
        bias = None if g.b is None or self.bias is None else g.b / self.bias.to(g.b.dtype)
        return replace(g, W=W, H=H, b=bias)

    def _block(
        self, a: Tensor, bT: Tensor, b: Tensor, aT: Tensor, s: Tensor, h: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Rows of the result for A and B: a = A_ij, bT = B_ji, b = B_ij, aT = A_ji; i are the
        ``rows`` of all.
        """
        mu, sj, si = self.mu, s[None, :], s[rows, None]
        q = si.square() + sj.square()
        hi, hj = h[rows, None] * q + 1e-4 * mu, h[None, :] * q + 1e-4 * mu
        along1, along2 = sj * a + si * bT, sj * b + si * aT
        across1, across2 = si * a - sj * bT, si * b - sj * aT
        determinant = (hi * hj + mu * (hi + hj)) * q
        out1 = ((hj + mu) * along1 + mu * along2) / determinant
        out2 = (mu * along1 + (hi + mu) * along2) / determinant
        scale = 0.25 / (mu * q)
        back1, back2 = (3.0 * across1 + across2) * scale, (across1 + 3.0 * across2) * scale
        return sj * out1 + si * back1, sj * out2 + si * back2

    def _diagonal(self, H: Tensor, W: Tensor, a: Tensor, b: Tensor) -> None:
        """The target's logit: its curvature is that of K - 1 off-target ones together, and A_ii,
        B_ii pair up.
        """
        h, s = self.h[self.here], self.s[self.here]
        target = ((self.s.numel() - 1) * h * s.square()).to(H.dtype) + 1e-4 * self.mu
        mean, half = (a + b) / (4 * target), (a - b) / (4 * self.mu)
        H.diagonal().copy_(mean + half)
        W.diagonal().copy_(mean - half)


class Pairs:
    """The row of `table`: L-BFGS begins in the gauge, after a proximal step where some class is not
    yet separated.
    """

    name = "pairs"
    newton = False

    def serves(self, objective: Objective) -> bool:
        """One row for each of the K classes in order, d >= K, a single-label softmax loss, balanced
        variables, nothing frozen; and every class well above the collapse threshold sqrt(n_k)/N >
        mu, below which its factors vanish and G is not -mu I.
        """
        problem, rows = objective.problem, objective.rows
        K, targets = problem.num_classes, rows.targets
        return (
            objective.plain
            and isinstance(problem.loss, SoftmaxLoss)
            and targets.single
            and rows.number == K
            and problem.dim >= K
            and (objective.layout is None or problem.dim <= _WHOLE)
            and problem.freeze is None
            and objective.variables == "balanced"
            and bool((targets.indices == torch.arange(K, device=targets.indices.device)).all())
            and (1.0 - problem.loss.smoothing) * float(rows.counts.min()) ** 0.5
            >= 2.0 * problem.mu * problem.num_samples
        )

    def bytes_of(self, objective: Objective) -> int:
        """A few vectors: the matrices of the first gauge are gone before there is a history."""
        return 0

    def work(self, objective: Objective) -> tuple[float, float]:
        return 60.0 * objective.problem.num_classes**2, 0.0

    def begin(self, objective: Objective, point: Point) -> Built:
        found = objective.value_and_grad(point, statistics=True)
        assert found.statistics is not None
        apart = not bool((found.statistics.margin <= 0).any())
        if not Spread(objective.layout).all(apart):  # look for the subspaces first
            point, found = lifted_step(objective, point, found)
        point = fix_gauge(point)
        return self.build(objective, point, objective.value_and_grad(point, statistics=True))

    def due(self, age: int, *, built: bool) -> bool:
        return built and age in (5, 15, 40, 100, 200, 400)

    def build(
        self, objective: Objective, point: Point, evaluation: Evaluation, *, lower: bool = False
    ) -> Built:
        if evaluation.statistics is None:
            evaluation = objective.value_and_grad(point, statistics=True)
        return Built(point, evaluation, PairPreconditioner.build(objective, point, evaluation))
