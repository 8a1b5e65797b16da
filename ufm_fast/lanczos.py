"""Lanczos for both ends of a symmetric operator's spectrum, and how far an end that it has not
found can lie.

Ritz values lie inside the spectrum, so the smallest is an upper bound on the smallest eigenvalue
and by itself proves nothing below it. What does is the start, uniform on the sphere: after k
products in n dimensions an end is missed by more than the part e of the spectrum's width with
probability at most 1.648 sqrt(n) exp(-sqrt(e) (2k - 1)).
Source: Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13, 1992, theorem 4.2. It is stated
for the top of a positive definite matrix; Krylov spaces do not change with a shift or the sign, so
it holds for both ends and relative to the width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: A Krylov space is invariant where what leaves it is that small against the operator: all the rest
#: is rounding.
_ROUNDING = 1e-13


class Lanczos:
    """The Krylov space of a symmetric ``product`` on R^n from ``start`` (n,), a vector for each
    ``step``.

    The basis (rows) is orthogonalised in full, twice, so that no Ritz value comes double.
    ``dimension``: that of the subspace in which start and products lie; ``most``: the steps that
    there is room for.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        start: Tensor,
        most: int,
        dimension: int | None = None,
    ) -> None:
        self.product = product
        self.dimension = start.numel() if dimension is None else dimension
        self.most = min(most, self.dimension)
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self._basis = start.new_empty(self.most, start.numel())
        self._basis[0] = start / start.norm()

    def step(self) -> None:
        """One product more."""
        k = len(self.diagonal)
        q, known = self._basis[k], self._basis[: k + 1]
        w = self.product(q)
        self.diagonal.append(float(w @ q))
        for _ in range(2):
            w = w - (known @ w) @ known
        self.off_diagonal.append(float(w.norm()))
        if not self.exhausted and k + 1 < self.most:
            self._basis[k + 1] = w / self.off_diagonal[-1]

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: then, with probability one, it holds an eigenvector of
        every eigenvalue.
        """
        size = max(*map(abs, self.diagonal), *self.off_diagonal, 1e-300)
        return len(self.diagonal) == self.dimension or self.off_diagonal[-1] <= _ROUNDING * size

    @property
    def ended(self) -> bool:
        """Whether there is no further step."""
        return self.exhausted or len(self.diagonal) == self.most

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and their vectors in the basis (columns). The residual of the
        j-th pair is off_diagonal[-1] |vectors[-1, j]|.
        """
        T = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64))
        if len(self.diagonal) > 1:
            beta = torch.tensor(self.off_diagonal[:-1], dtype=torch.float64)
            T += torch.diag(beta, 1) + torch.diag(beta, -1)
        values, vectors = torch.linalg.eigh(T)
        return values, vectors

    def vector(self, coefficients: Tensor) -> Tensor:
        """The unit vector of R^n with these coordinates in the basis."""
        found = coefficients.to(self._basis) @ self._basis[: len(self.diagonal)]
        unit: Tensor = found / found.norm()
        return unit

    def missed(self, failure_probability: float) -> float:
        """The part of the spectrum's width by which one end may lie beyond its Ritz value, but for
        that probability.
        """
        steps = len(self.diagonal)
        return (
            math.log(1.648 * math.sqrt(self.dimension) / failure_probability) / (2 * steps - 1)
        ) ** 2
