"""A preconditioner for several targets a row, whose logits are held together by curvatures far
above all others.

Near collapse off-target logits hardly curve the loss, and curvatures are of the order of mu; but
the targets of a row share its softmax. With f_r the features of row r in the units of its logits,
s_r that unit, w_r its weight, M_r its number of targets and p_e the softmax of its targets among
themselves, that part of the Gauss-Newton matrix is J'J,

    (J v)_e = sqrt(w_r M_r p_e) (dz_e - sum of p dz over the row's targets),
    dz_e = f_r.dB_k + s_r B_k.dA_r + beta db_k

with eigenvalues up to w |f|^2, a million mu and more. Its rank is below the number E of (row,
target) entries, so mu + J'J is inverted by Woodbury's formula through the E x E matrix mu + J J',
the inner products of features and of classes. (Our derivation; measured below.)

Decisions

2026-11-26. Several targets a row have a preconditioner of their own (`solvers/curvature/sets.py`).
At small penalties the logits of one row's targets curve the loss a million times as much as all
else, in as many directions as there are targets beyond one a row; L-BFGS and CG spent their steps
on those. That part of the Gauss-Newton matrix is mu + J'J with J of low rank, inverted through the
inner products of features and of classes. Ten random problems at K = 32, lambda = 4e-6 take 181 to
484 evaluations instead of 1,146 to 5,417 (`bench/reasons/pick_all.py`, counts only). Rebuilt every
30 steps, and at each Newton step. It is used up to 2,048 entries in rows of several targets, and
beyond 256 where building it costs no more than five gradients. Tried and dropped: stopping CG by
the preconditioned residual, which leaves the stiff directions unsolved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.losses import PickAll
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.curvature.base import Built
from ufm_fast.targets import Targets

#: Entries of rows with several targets, up to which their matrix is formed: 32 MiB, and five times
#: that on the way.
MOST_ENTRIES = 2048
_EVERY = 30  # steps between two builds


def entries(targets: Targets, classes: int, dim: int) -> int:
    """E, or 0 where the matrix is too large, or not small and to build it costs more than five
    gradients.
    """
    if targets.indptr is None:
        return 0
    E, R = _several(targets).numel(), targets.rows
    cheap = E <= 256 or E**3 / 3 + 4 * E**2 * dim <= 5 * 6 * R * classes * dim
    return E if cheap and E <= MOST_ENTRIES else 0


def _several(targets: Targets) -> Tensor:
    """Entries, in order, of the rows that have more than one target."""
    rows, _ = targets.slice(0, targets.rows)
    return torch.nonzero(targets.sizes()[rows] > 1)[:, 0]


@dataclass(frozen=True)
class TargetPreconditioner:
    """Inverse of mu + J'J at a point. ``rows``, ``columns``, ``coefficient``, ``p`` (E,);
    ``factor``: Cholesky, (E, E).

    ``group`` (E,): the rows among those with several targets, of which there are fewer than E
    however many have one.
    """

    rows: Tensor
    columns: Tensor
    group: Tensor
    features: Tensor  # f of each entry, (E, d)
    classes: Tensor  # s B of each entry, (E, d)
    coefficient: Tensor
    p: Tensor
    factor: Tensor
    mu: float
    bias_scale: float

    @classmethod
    def build(cls, objective: Objective, x: Point) -> TargetPreconditioner | None:
        """At a point in the solver's variables; None where rounding leaves nothing to invert."""
        targets, mu = objective.targets, objective.problem.mu
        several = _several(targets)
        rows, columns = (part[several] for part in targets.slice(0, targets.rows))
        group = torch.unique_consecutive(rows, return_inverse=True)[1]
        unit = objective.scales.logits[rows]
        features, classes = x.H[rows] * unit, x.W[columns]
        z = torch.linalg.vecdot(features, classes).double()
        bias = objective.scales.model_bias(x)
        if bias is not None:
            z = z + bias[columns].double()
        same = rows[:, None] == rows
        p = torch.softmax(torch.where(same, z, -torch.inf), 1).diagonal()
        coefficient = ((objective.row_weight * targets.sizes())[rows].double() * p).sqrt()
        classes = classes * unit
        beta = 0.0 if bias is None else objective.scales.bias
        gram = torch.where(same, classes.double() @ classes.double().T, 0.0)
        gram += torch.where(
            columns[:, None] == columns, features.double() @ features.double().T + beta**2, 0.0
        )
        # What rounding leaves of its zeros must not be negative; more than mu is still a
        # preconditioner.
        least = (
            float(gram.diagonal().max() * coefficient.max() ** 2)
            * len(p)
            * torch.finfo(gram.dtype).eps
        )
        for _ in range(2):  # centre one side, then the other
            gram = (coefficient[:, None] * (gram - _row_sum(p[:, None] * gram, group))).T
        for raised in (1.0, 1e3, 1e6):
            factor, failed = torch.linalg.cholesky_ex(
                gram + max(mu, raised * least) * torch.eye(len(p)).to(gram)
            )
            if not int(failed):
                return cls(
                    rows, columns, group, features, classes, coefficient, p, factor, mu, beta
                )
        return None

    def apply(self, g: Point) -> Point:
        """(mu + J'J)^-1 g, a new point."""
        change = torch.linalg.vecdot(self.features, g.W[self.columns]) + torch.linalg.vecdot(
            self.classes, g.H[self.rows]
        )
        change = change.double()
        if g.b is not None:
            change += self.bias_scale * g.b[self.columns].double()
        pull = self.coefficient * (change - _row_sum(self.p * change, self.group))
        pull = self.coefficient * torch.cholesky_solve(pull[:, None], self.factor)[:, 0]
        pull = (pull - self.p * _row_sum(pull, self.group)).to(g.W.dtype)
        W = g.W.index_add(0, self.columns, self.features * pull[:, None], alpha=-1)
        H = g.H.index_add(0, self.rows, self.classes * pull[:, None], alpha=-1)
        b = (
            None
            if g.b is None
            else g.b.index_add(0, self.columns, pull.to(g.b.dtype), alpha=-self.bias_scale)
        )
        return Point(W, H, b).scale(1.0 / self.mu)


def _row_sum(values: Tensor, group: Tensor) -> Tensor:
    """At each entry, the sum of ``values`` (E, ...) over the entries of its row."""
    return torch.zeros_like(values).index_add_(0, group, values)[group]


class Sets:
    """The row of `table`: L-BFGS begins with it."""

    name = "sets"
    newton = True

    def serves(self, objective: Objective) -> bool:
        """Pick-all with several targets in some rows, few enough of them; one layer, balanced
        variables, nothing frozen.
        """
        problem = objective.problem
        balanced = objective.variables == "balanced" and problem.freeze is None
        if not (objective.plain and isinstance(problem.loss, PickAll) and balanced):
            return False
        return entries(objective.targets, problem.num_classes, problem.dim) > 0

    def bytes_of(self, objective: Objective) -> int:
        """While the matrix of the entries is formed."""
        return (
            48
            * entries(objective.targets, objective.problem.num_classes, objective.problem.dim) ** 2
        )

    def work(self, objective: Objective) -> tuple[float, float]:
        E = entries(objective.targets, objective.problem.num_classes, objective.problem.dim)
        return 4.0 * E**2, E**3 / 3 / _EVERY

    def begin(self, objective: Objective, point: Point) -> Built:
        return self.build(objective, point, objective.value_and_grad(point))

    def due(self, age: int, *, built: bool) -> bool:
        """Often at first, when all curvatures change."""
        return built and (age in (3, 6, 10, 15, 20) or (age > 0 and age % _EVERY == 0))

    def build(
        self, objective: Objective, point: Point, evaluation: Evaluation, *, lower: bool = False
    ) -> Built:
        return Built(point, evaluation, TargetPreconditioner.build(objective, point))
