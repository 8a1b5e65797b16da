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

2026-11-30. On several ranks each has the blocks of its own rows and classes. To build them all
others' classes pass by twice, and rows once, 256 of each rank at a time; a product sends nothing.
K = 40, d = 8, lambda = 1e-4: 227 evaluations in one process and on one rank, 228 on two, where the
identity took 381 and 377 on ranks (`python -m bench rank_models`, torch 2.13.0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.layout import Layout, gathered, share
from ufm_fast.losses import CrossEntropy
from ufm_fast.memory import available_bytes
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.curvature.base import Built
from ufm_fast.spread import Spread

_EVERY = 60  # steps between two builds
_BLOCK = 1 << 24  # numbers of a block of outer products
_ROUND = 1 << 8  # rows of a rank that go to all at a time


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
        layout, head, mu = objective.layout, objective.head_input(x), objective.problem.mu
        weight, dtype = objective.row_weight[:, None].double(), x.W.dtype
        F, B = head.features.double(), head.weight.double()
        bias = B.new_zeros(len(B)) if head.bias is None else head.bias.double()
        mass, of_rows = _of_rows(layout, F, B, bias)
        of_classes, curving = _of_classes(layout, B, bias, F, mass, weight)
        unit = (weight * objective.scales.logits.double().square())[:, :, None]
        eye = mu * torch.eye(B.shape[1], dtype=torch.float64, device=B.device)
        factors = [
            torch.linalg.cholesky_ex(blocks + eye) for blocks in (of_classes, unit * of_rows)
        ]
        sound = not any(bool(failed.any()) for _, failed in factors)
        if not Spread(layout).all(sound):
            return None
        classes, rows = (torch.cholesky_inverse(factor).to(dtype) for factor, _ in factors)
        if x.b is None:
            return cls(classes, rows, None)
        scales = objective.scales
        return cls(classes, rows, curving * scales.bias**2 + max(scales.penalties.bias, 1e-2 * mu))

    def apply(self, g: Point) -> Point:
        # Not bmm, which is a call a block too.
        W, H = (
            (inverse * part[:, None, :]).sum(2)
            for part, inverse in ((g.W, self.classes), (g.H, self.rows))
        )
        b = None if g.b is None or self.bias is None else g.b / self.bias.to(g.b.dtype)
        return replace(g, W=W, H=H, b=b)


def _rounds(layout: Layout | None, height: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of each of the parts, of ranks ``_ROUND`` of each of them at a time, of at most
    ``height`` a rank.
    """
    if layout is None:
        yield parts
        return
    for start in range(0, height, _ROUND):
        yield tuple(
            torch.cat(gathered(layout.mesh.world, part[start : start + _ROUND], "curvature"))
            for part in parts
        )


def _of_rows(layout: Layout | None, F: Tensor, B: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """log sum_k exp z_rk of the rows here, (R, 1), and  B' diag(p_r) B - (B'p_r)(B'p_r)'  of
    each.
    """
    R, d = F.shape
    height = 0 if layout is None else layout.class_height
    mass = F.new_full((R, 1), -math.inf)
    for classes, b in _rounds(layout, height, B, bias):
        mass = torch.logaddexp(mass, torch.logsumexp(F @ classes.T + b, 1, keepdim=True))
    mean, total = F.new_zeros(R, d), F.new_zeros(R, d * d)
    for classes, b in _rounds(layout, height, B, bias):
        p = torch.exp(F @ classes.T + b - mass)
        mean.addmm_(p, classes)
        _add_second_moments(total, p, classes)
    return mass, total.reshape(R, d, d) - _outer(mean)


def _of_classes(
    layout: Layout | None, B: Tensor, bias: Tensor, F: Tensor, mass: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """sum_r c_rk f_r f_r'  and  sum_r c_rk  with  c_rk = w_r p_rk (1 - p_rk)  of the classes
    here.
    """
    K, d = B.shape
    total, sums = B.new_zeros(K, d * d), B.new_zeros(K)
    height = 0 if layout is None else layout.row_height
    for features, of_row, w in _rounds(layout, height, F, mass, weight):
        p = torch.exp(features @ B.T + bias - of_row)
        curving = w * p * (1.0 - p)
        sums += curving.sum(0)
        _add_second_moments(total, curving.T, features)
    return total.reshape(K, d, d), sums


def _outer(X: Tensor) -> Tensor:
    return X[:, :, None] * X[:, None, :]


def _add_second_moments(total: Tensor, weights: Tensor, X: Tensor) -> None:
    """total_j += sum_i weights_ji x_i x_i' for each row j of ``weights`` (J x I), by blocks of
    rows of X (I x d): (J, d d).
    """
    d = X.shape[1]
    for start in range(0, X.shape[0], size := max(1, _BLOCK // (d * d))):
        part = slice(start, start + size)
        total.addmm_(weights[:, part], _outer(X[part]).flatten(1))


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
        layout, free = objective.layout, available_bytes(objective.row_weight.device) // 4
        if layout is None:
            return self.bytes_of(objective) <= free
        return layout.all(self.bytes_of(objective) * layout.mesh.neighbours <= free)

    def bytes_of(self, objective: Objective) -> int:
        problem, layout = objective.problem, objective.layout
        ranks = 1 if layout is None else layout.mesh.ranks
        K, R = (share(number, ranks) for number in (problem.num_classes, objective.rows.number))
        return bytes_of(K, R, problem.dim)

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
