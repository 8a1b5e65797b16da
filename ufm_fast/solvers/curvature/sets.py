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

2026-11-30. On several ranks each has features and class of all entries, E x d numbers that are
summed when the matrix is built, and a product sums E numbers. K = 8, all sets of one label and of
two, d = 8, lambda = 1e-5: 213 evaluations in one process, 214 on one rank and 215 on two, where the
identity took 752 and 731 on ranks (`python -m bench rank_models`, torch 2.13.0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.layout import Layout
from ufm_fast.losses import PickAll
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.curvature.base import Built
from ufm_fast.spread import Spread
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
class _Held:
    """The rows of a matrix at the E entries: ``at`` of those that are here, which are the entries
    ``which`` (None: all).
    """

    at: Tensor
    number: int
    which: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor, part: slice | None) -> _Held:
        """``index`` (E,): of rows, of which those of ``part`` are here."""
        if part is None:
            return cls(index, len(index))
        which = torch.nonzero((index >= part.start) & (index < part.stop))[:, 0]
        return cls(index[which] - part.start, len(index), which)

    def entries(self, x: Tensor) -> Tensor:
        """The row of x at each entry, (E, ...); zeros where it is elsewhere."""
        if self.which is None:
            return x[self.at]
        return x.new_zeros(self.number, *x.shape[1:]).index_copy_(0, self.which, x[self.at])

    def less(self, x: Tensor, change: Tensor, factor: float = 1.0) -> Tensor:
        """x less what the entries change, times the factor."""
        mine = change if self.which is None else change[self.which]
        return x.index_add(0, self.at, mine.to(x.dtype), alpha=-factor)


@dataclass(frozen=True)
class TargetPreconditioner:
    """Inverse of mu + J'J at a point. ``coefficient``, ``p`` (E,); ``factor``: Cholesky, (E, E).

    ``group`` (E,): the rows among those with several targets, of which there are fewer than E
    however many have one. ``rows`` and ``columns``: what of H and W is here.
    """

    rows: _Held
    columns: _Held
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
        layout, mu, spread = objective.layout, objective.problem.mu, _spread(objective.layout)
        rows, columns = _entries_of(objective)
        group = torch.unique_consecutive(rows, return_inverse=True)[1]
        of_rows = _Held.of(rows, None if layout is None else layout.row_part)
        of_columns = _Held.of(columns, None if layout is None else layout.class_part)
        weight = objective.row_weight * objective.targets.sizes()
        unit, weight, features = (
            spread.total(of_rows.entries(part)) for part in (objective.scales.logits, weight, x.H)
        )
        features, classes = features * unit, spread.total(of_columns.entries(x.W))
        z = torch.linalg.vecdot(features, classes).double()
        bias = objective.scales.model_bias(x)
        if bias is not None:
            z = z + spread.total(of_columns.entries(bias)).double()
        same = rows[:, None] == rows
        p = torch.softmax(torch.where(same, z, -torch.inf), 1).diagonal()
        coefficient = (weight.double() * p).sqrt()
        classes = classes * unit
        beta = 0.0 if bias is None else objective.scales.bias
        gram = torch.where(same, classes.double() @ classes.double().T, 0.0)
        gram += torch.where(
            columns[:, None] == columns, features.double() @ features.double().T + beta**2, 0.0
        )
        # What rounding leaves of its zeros must not be negative; more than mu is still a
        # preconditioner.
        largest = float(gram.diagonal().max() * coefficient.max() ** 2)
        least = largest * len(p) * torch.finfo(gram.dtype).eps
        for _ in range(2):  # centre one side, then the other
            gram = (coefficient[:, None] * (gram - _row_sum(p[:, None] * gram, group))).T
        for raised in (1.0, 1e3, 1e6):
            factor, failed = torch.linalg.cholesky_ex(
                gram + max(mu, raised * least) * torch.eye(len(p)).to(gram)
            )
            if spread.all(not int(failed)):
                held = of_rows, of_columns, group, features, classes, coefficient, p
                return cls(*held, factor, mu, beta)
        return None

    def apply(self, g: Point) -> Point:
        """(mu + J'J)^-1 g, a new point."""
        of_classes, of_rows = self.columns.entries(g.W), self.rows.entries(g.H)
        change = torch.linalg.vecdot(self.features, of_classes)
        change = (change + torch.linalg.vecdot(self.classes, of_rows)).double()
        if g.b is not None:
            change += self.bias_scale * self.columns.entries(g.b).double()
        change = _spread(g.layout).total(change)
        pull = self.coefficient * (change - _row_sum(self.p * change, self.group))
        pull = self.coefficient * torch.cholesky_solve(pull[:, None], self.factor)[:, 0]
        pull = (pull - self.p * _row_sum(pull, self.group)).to(g.W.dtype)
        W = self.columns.less(g.W, self.features * pull[:, None])
        H = self.rows.less(g.H, self.classes * pull[:, None])
        b = None if g.b is None else self.columns.less(g.b, pull, self.bias_scale)
        return replace(g, W=W, H=H, b=b).scale(1.0 / self.mu)


def _spread(layout: Layout | None) -> Spread:
    return Spread(layout, "curvature")


def _entries_of(objective: Objective) -> tuple[Tensor, Tensor]:
    """Row and class of each entry of all rows with several targets."""
    targets = objective.rows.targets
    several = _several(targets)
    rows, columns = (part[several] for part in targets.slice(0, targets.rows))
    device = objective.row_weight.device
    return rows.to(device), columns.to(device)


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
        return self._entries(objective) > 0

    @staticmethod
    def _entries(objective: Objective) -> int:
        problem = objective.problem
        return entries(objective.rows.targets, problem.num_classes, problem.dim)

    def bytes_of(self, objective: Objective) -> int:
        """While the matrix of the entries is formed."""
        return 48 * self._entries(objective) ** 2

    def work(self, objective: Objective) -> tuple[float, float]:
        E = self._entries(objective)
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
