"""A preconditioner for cross-entropy with more classes than dimensions can keep apart, K > d + 1: a
d x d block each.

There the landscape is that of a code: every class has its own neighbours, and curvatures differ
from row to row. With f_r the features of row r in the units of its logits, s_r that unit, w_r its
weight and p_r its softmax, the Gauss-Newton matrix has the diagonal blocks

    class k   sum_r w_r p_rk (1 - p_rk) f_r f_r' + mu I,        row r
    w_r s_r^2 (B' diag(p_r) B - (B'p_r)(B'p_r)') + mu I,

which are inverted one by one (batched Cholesky); the coupling between classes and rows is left to
the pairs of L-BFGS. Built every 60 steps at the price of a few gradients of d columns: R K d^2
operations. Used where the (K + R) d^2 numbers fit. (Our derivation; measured in
bench/reasons/codes.py.)

2026-11-30. At K = 500, d = 32 L-BFGS stalls with it at 1.4e-6 mu, after 3,149 evaluations. The
default method ends what is left by Newton-CG, with one step of many products: 4.2e-8 mu after 4,865
evaluations in all (`python -m bench codes --models codes --method auto`; torch 2.13.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.losses import CrossEntropy
from ufm_fast.memory import available_bytes
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.curvature.base import Built

_EVERY = 60  # steps between two builds
_BLOCK = 1 << 24  # numbers of a block of outer products


@dataclass(frozen=True)
class CodePreconditioner:
    """Inverses of the blocks, (K, d, d) and (R, d, d), and the bias's curvature (K,) or None.

    Inverses, for a product with each is a pass over memory, where a pair of triangular solves is a
    call a block.
    """

    classes: Tensor
    rows: Tensor
    bias: Tensor | None

    @classmethod
    def build(cls, objective: Objective, x: Point) -> CodePreconditioner | None:
        """At a point in the solver's variables; None where rounding leaves nothing to invert."""
        head, mu, weight = (
            objective.head_input(x),
            objective.problem.mu,
            objective.row_weight[:, None],
        )
        F, B = head.features.double(), head.weight.double()
        z = F @ B.T if head.bias is None else F @ B.T + head.bias.double()
        p = torch.softmax(z, 1)
        curving = weight * p * (1.0 - p)
        of_rows = _second_moments(p, B) - _outer(p @ B)
        unit = (weight * objective.scales.logits.double().square())[:, :, None]
        eye = mu * torch.eye(B.shape[1], dtype=torch.float64, device=B.device)
        factors = [
            torch.linalg.cholesky_ex(blocks + eye)
            for blocks in (_second_moments(curving.T, F), unit * of_rows)
        ]
        if any(int(failed.max()) for _, failed in factors):
            return None
        bias = (
            None
            if x.b is None
            else curving.sum(0) * objective.scales.bias**2
            + max(objective.scales.penalties.bias, 1e-2 * mu)
        )
        classes, rows = (torch.cholesky_inverse(factor).to(x.W.dtype) for factor, _ in factors)
        return cls(classes, rows, bias)

    def apply(self, g: Point) -> Point:
        # Not bmm, which is a call a block too.
        W, H = (
            (inverse * part[:, None, :]).sum(2)
            for part, inverse in ((g.W, self.classes), (g.H, self.rows))
        )
        return Point(
            W, H, None if g.b is None or self.bias is None else g.b / self.bias.to(g.b.dtype)
        )


def _outer(X: Tensor) -> Tensor:
    return X[:, :, None] * X[:, None, :]


def _second_moments(weights: Tensor, X: Tensor) -> Tensor:
    """sum_i weights_ji x_i x_i' of each row j of ``weights`` (J x I), by blocks of rows of X (I x
    d): (J, d, d).
    """
    d = X.shape[1]
    total = X.new_zeros(weights.shape[0], d * d)
    for start in range(0, X.shape[0], size := max(1, _BLOCK // (d * d))):
        part = slice(start, start + size)
        total.addmm_(weights[:, part], _outer(X[part]).flatten(1))
    return total.reshape(-1, d, d)


def bytes_of(classes: int, rows: int, dim: int) -> int:
    """What building it holds: blocks and factors of classes and rows, the softmax, and a block of
    outer products.
    """
    block = min(max(_BLOCK, dim * dim), max(classes, rows) * dim * dim)
    return 8 * (3 * (classes + rows) * dim * dim + 4 * rows * classes + block)


class Codes:
    """The row of `table`: L-BFGS begins with it."""

    name = "codes"
    newton = False

    def serves(self, objective: Objective) -> bool:
        """Cross-entropy (with smoothing), K > d + 1, one layer, balanced variables, both penalties,
        nothing frozen.
        """
        problem = objective.problem
        K, d = problem.num_classes, problem.dim
        balanced = objective.variables == "balanced" and problem.freeze is None and problem.mu > 0
        if not (objective.plain and type(problem.loss) is CrossEntropy and balanced and d + 1 < K):
            return False
        return self.bytes_of(objective) <= available_bytes(objective.row_weight.device) // 4

    def bytes_of(self, objective: Objective) -> int:
        return bytes_of(objective.problem.num_classes, objective.rows.number, objective.problem.dim)

    def work(self, objective: Objective) -> tuple[float, float]:
        K, R, d = objective.problem.num_classes, objective.rows.number, objective.problem.dim
        return 4.0 * (K + R) * d * d, 4.0 * K * R * d * d / _EVERY

    def begin(self, objective: Objective, point: Point) -> Built:
        return self.build(objective, point, objective.value_and_grad(point))

    def due(self, age: int, *, built: bool) -> bool:
        """Often at first, when all curvatures change."""
        return age in (5, 10, 20, 40) or (age > 0 and age % _EVERY == 0)

    def build(
        self, objective: Objective, point: Point, evaluation: Evaluation, *, lower: bool = False
    ) -> Built:
        return Built(point, evaluation, CodePreconditioner.build(objective, point))
