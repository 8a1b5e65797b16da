"""The Gauss-Newton matrix of the squared error, inverted exactly: a preconditioner by two
eigendecompositions.

In balanced variables the residuals E = D^1/2 (H W' + 1 b' - Y) change by
dE = alpha (dA B' + A dB') + beta d dc'  with alpha = N^(-1/2), d_r = sqrt(n_r / N) and beta the
bias's scale. With J that map, A~ = [alpha A, beta d] and C~ = [C, c], J J' E = alpha^2 E B B' + A~
A~' E, which is diagonal in the eigenvectors U of alpha^2 B B' and V of A~ A~', values a and v:

    (mu + J'J)^-1 = (1 - J' (mu + J J')^-1 J) / mu,      V'(mu + J J')^-1 E U = (V'E U)_ij / (mu +
    v_i + a_j),

and 1 / (mu + a_j) or 1 / (mu + v_i) where only one side lies in a span. Residuals and their
products are never formed: with Q = alpha U'B and P = V'A~ all of it is products with d or min(K, d)
columns, O((K + R) d^2). Without it the condition of the problem is of the order of 1 / (mu N). What
it leaves is the directions that keep all logits, along A T, B T^-T: curved, so that straight steps
along them are short. Their best point is known (`balance`), and the factors are moved there
whenever the matrix is built. Small penalties take about a hundred evaluations then, where they took
thousands (`bench/reasons/squared_model.py`). (Our derivation.)

Decisions

2026-11-26. The squared error has a preconditioner of its own (`solvers/curvature/squares.py`): 2 mu
+ J'J with J the whole differential of the residuals, inverted in two eigenbases at the price of a
few gradients, and factors moved to the balanced ones of the same product, the best point of the
directions that keep all logits. Twelve classes of 1 to 100 samples, lambda of 1e-5 to 1e-8, a
random start: 48 to 197 evaluations instead of 400 to 18,401 for d >= K - 1, and 91 to 546 instead
of 3,229 to 21,217 at d = 5 (`bench/reasons/squared_model.py`, counts only). L-BFGS builds it at
step 30: sooner, a full step could put out a direction that the minimum needs, and random starts
ended at saddles (`tests/solvers/test_methods.py`). Penalties of 1e-10 still take many thousands.
Tried and dropped: balanced factors every few steps of softmax losses, which cost more evaluations
than they saved. Its vectors are planned (`bench/memory.py`).

2026-11-30. On several ranks only d x d matrices are summed or gathered: the Grams, what a gradient
has in the two spans (two matrices a product), and the triangular factors of balanced factors
(`tall`). Twelve classes, d = 12, lambda = 1e-5: 45 evaluations in one process, on one rank and on
two, where the identity took 386 and 373 on ranks (`python -m bench rank_models`, torch 2.13.0).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ufm_fast.backends.gram import gram
from ufm_fast.losses import SquaredError
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import rounding
from ufm_fast.solvers.curvature.base import Built
from ufm_fast.spread import Spread
from ufm_fast.tall import qr

#: The step of L-BFGS that builds it. Sooner, a full step can put out a direction that is wanted,
#: and end at a saddle.
FIRST = 30
_EVERY = 20  # steps between two builds


def balance(x: Point) -> Point:
    """The factors of the same product A B' with A'A = B'B, whose squares have the least sum: twice
    its nuclear norm.
    """
    spread = Spread(x.layout, "curvature")
    (A, of_A), (B, of_B) = (qr(part.double(), spread.mesh) for part in (x.H, x.W))
    U, s, Vh = torch.linalg.svd(of_A @ of_B.T, full_matrices=False)
    U, s, Vh = map(spread.first, (U, s, Vh))
    root, pad = s.sqrt(), (0, x.W.shape[1] - len(s))
    factors = (torch.nn.functional.pad(part, pad) for part in (B @ (Vh.T * root), A @ (U * root)))
    W, H = (part.to(x.W.dtype) for part in factors)
    return replace(x, W=W, H=H)


def move(
    objective: Objective, x: Point, evaluation: Evaluation, *, lower: bool
) -> tuple[Point, Evaluation]:
    """To the balanced factors, unless the value rises; with ``lower`` only where it falls (beyond
    rounding).
    """
    point = balance(x)
    found = objective.value_and_grad(point)
    noise = rounding(objective, found.value)
    return (
        (point, found)
        if found.value <= evaluation.value + (-noise if lower else noise)
        else (x, evaluation)
    )


@dataclass(frozen=True)
class _Span:
    """An orthonormal basis of the columns of alpha X (rows x d): X T, or T itself where all rows
    are here and at most d.

    ``values`` (k,): eigenvalues of alpha^2 X X'. ``products`` (k x d): alpha basis' X.
    """

    X: Tensor | None
    T: Tensor
    values: Tensor
    products: Tensor
    spread: Spread  # of ranks that have the other rows

    @classmethod
    def of(cls, X: Tensor, alpha: float, spread: Spread) -> _Span:
        """Of alpha X."""
        few = X.shape[0] <= X.shape[1] and spread.layout is None
        inner = X.double() @ X.T.double() if few else spread.total(gram(X))
        values, vectors = map(spread.first, torch.linalg.eigh(inner))
        keep = values > 1e-14 * values[-1].clamp_min(1e-300)
        values, vectors = values[keep], vectors[:, keep]
        T = (vectors if few else vectors / values.sqrt()).to(X.dtype)
        products = T.T @ X if few else (vectors * values.sqrt()).T.to(X.dtype)
        spectrum = (alpha**2 * values).to(X.dtype)
        return cls(None if few else X, T, spectrum, alpha * products, spread)

    def inside(self, Y: Tensor) -> Tensor:
        """basis' Y."""
        return self.T.T @ Y if self.X is None else self.spread.total(self.T.T @ (self.X.T @ Y))

    def outside(self, Y: Tensor) -> Tensor:
        """basis Y."""
        return self.T @ Y if self.X is None else self.X @ (self.T @ Y)


@dataclass(frozen=True)
class SquaredPreconditioner:
    """Inverse of 2 mu + J'J at a point: on the directions that keep all logits the residuals curve
    f by up to mu themselves.
    """

    classes: _Span  # of alpha B
    features: _Span  # of A~
    shift: float

    @classmethod
    def build(cls, objective: Objective, x: Point) -> SquaredPreconditioner:
        """At a point in the solver's variables."""
        alpha, features = objective.problem.num_samples**-0.5, x.H
        spread = Spread(objective.layout, "curvature")
        if x.b is not None:
            column = objective.scales.bias / alpha * objective.row_weight.sqrt()
            features = torch.cat([x.H, column.to(x.H.dtype)[:, None]], 1)
        spans = _Span.of(x.W, alpha, spread), _Span.of(features, alpha, spread)
        return cls(*spans, 2.0 * objective.problem.mu)

    def apply(self, g: Point) -> Point:
        """(2 mu + J'J)^-1 g, a new point."""
        weight = g.W if g.b is None else torch.cat([g.W, g.b[:, None]], 1)
        of_features, of_classes = g.H @ self.classes.products.T, weight @ self.features.products.T
        row, column = (
            self.features.inside(of_features),
            self.classes.inside(of_classes),
        )  # v x a, a x v
        a, v = self.shift + self.classes.values, self.shift + self.features.values
        both = (row + column.T) / (v[:, None] + self.classes.values)
        H = g.H - (self.features.outside(both - row / a) + of_features / a) @ self.classes.products
        weight = (
            weight
            - (self.classes.outside(both.T - column / v) + of_classes / v) @ self.features.products
        )
        W, b = (weight, None) if g.b is None else (weight[:, :-1], weight[:, -1])
        return replace(g, W=W, H=H, b=b).scale(1.0 / self.shift)


class Squares:
    """The row of `table`: built from step ``FIRST`` of L-BFGS on, at the balanced factors."""

    name = "squares"
    newton = True

    def serves(self, objective: Objective) -> bool:
        """Squared error of one layer in balanced variables with both penalties and nothing
        frozen.
        """
        problem = objective.problem
        balanced = objective.variables == "balanced" and problem.freeze is None and problem.mu > 0
        return objective.plain and isinstance(problem.loss, SquaredError) and balanced

    def bytes_of(self, objective: Objective) -> int:
        """Two spans and what the balanced factors take: three vectors of the size of the
        parameters.
        """
        problem = objective.problem
        return 3 * problem.entries(objective.rows.number) * objective.dtype.itemsize

    def work(self, objective: Objective) -> tuple[float, float]:
        entries, d = objective.problem.entries(objective.rows.number), objective.problem.dim
        return 0.0, 16.0 * entries * min(d, objective.problem.num_classes)

    def begin(self, objective: Objective, point: Point) -> Built:
        return Built(point, objective.value_and_grad(point), None)

    def due(self, age: int, *, built: bool) -> bool:
        """Often at first, when all curvatures change."""
        since = age - FIRST
        if not built:
            return since == 0
        return since in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16) or (since > 0 and since % _EVERY == 0)

    def build(
        self, objective: Objective, point: Point, evaluation: Evaluation, *, lower: bool = False
    ) -> Built:
        point, evaluation = move(objective, point, evaluation, lower=lower)
        return Built(point, evaluation, SquaredPreconditioner.build(objective, point))
