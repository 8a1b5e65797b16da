"""The softmax group problem solved to a certified gap: Newton's method along a path of smoothed
nuclear norms.

The logits enter the penalty through the gaps, (K_g - 1) sqrt(n_g) a_g, and the G x G matrix T_gh =
x_gh sqrt(n_g K_g K_h) of the groups' mean logits, |T|_*. Convex, but with a kink where T loses
rank, which it does with every group that collapses. So minimise

    F + sum_g (K_g - 1) sqrt(n_g) a_g + sum_i sqrt(sigma_i(T)^2 + e^2)

while e falls step by step. Its minimiser moves linearly in e near the end (singular values that
vanish are proportional to e, the others move by e^2), so each fall is predicted by the tangent of
the path, in the same linear system as the Newton step.

The system (D + S) dT = r has D, the data's curvature, nearly diagonal in the entries of T, and S,
the penalty's, exactly diagonal in pairs (ij, ji) of T's singular bases. S says nothing of the
symmetric part there, D says little of the rest, and they differ by the factor K: conjugate
gradients need S and D's diagonal in those bases (2 x 2 blocks) as the preconditioner, with which
most steps take a few products. Tried and dropped: L-BFGS on factors of T, which stalls far above
the gap that is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ufm_fast.class_groups import Array
from ufm_fast.groups.bounds import dual
from ufm_fast.groups.softmax import LEAST, Curvature, Logits, SoftmaxTerm


class Pace(NamedTuple):
    """How the path is walked. ``fall``: what e is multiplied by; ``near``: a Newton decrement below
    this part of what the smoothing costs lets e fall; ``forcing``: residual of the linear systems,
    relative, in the preconditioner's norm.
    """

    fall: float
    near: float
    forcing: float


#: The second where the first has lost the path.
PACES = (Pace(0.2, 0.03, 1e-2), Pace(0.3, 0.01, 1e-3))
# Nats a step may change a logit difference by: beyond, the softmax's curvature says nothing.
LARGEST_CHANGE = 4.0
LAST_FORCING = (
    1e-8  # the same in the last steps, whose error is what is left of the certificate's gap
)
ROUNDING = 1e-14
LATE = 1e-4  # what the smoothing costs, relative, from which on the rank is looked for
ATTEMPTS = 4  # polishings, each from a smaller smoothing, after which rounding is what is left
POLISHING = 8  # Newton steps of fixed rank at most
HELD = 1e100  # the curvature of what does not move
APART = (
    10.0,
    1e4,
)  # no singular value between these multiples of e: then those below vanish and those above do not


@dataclass(frozen=True, eq=False)
class Reduced:
    """A solved group problem: gaps a (G,), T = left diag(sigma) right' (G x G), bias (G,), and what
    was proved of it.
    """

    gaps: Array
    left: Array
    sigma: Array
    right: Array
    bias: Array
    value: float
    data_value: float
    bound: float
    spectral_ratio: float
    steps: int
    converged: bool

    @property
    def gap(self) -> float:
        return self.value - self.bound


class _Smoothed:
    """sum_i sqrt(sigma_i^2 + e^2) around T = U diag(sigma) V': slopes, and Hessian in the singular
    bases.
    """

    def __init__(self, sigma: Array, width: float) -> None:
        rho = np.sqrt(sigma**2 + width**2)
        self.slope = sigma / rho
        self.fall = -sigma * width / rho**3  # derivative of the slope in e
        self.cost = float(
            (sigma * (1 - self.slope)).sum()
        )  # what the smoothing leaves of the duality gap
        both, cross, product = np.add.outer(sigma, sigma), np.outer(sigma, rho), np.outer(rho, rho)
        cross = cross + cross.T
        with np.errstate(divide="ignore", invalid="ignore"):
            even = np.where(both > 0, width**2 * both / (product * cross), 1 / width)
            odd = np.where(both > 0, cross / (product * both), 1 / width)
        self.same, self.swapped = (even + odd) / 2, (even - odd) / 2


class _OfRank:
    """|T|_* on the matrices of T's rank, the limit of the smoothed one: `slope` is 1, or what the
    data pull at where T is zero.

    Pairs of zero singular values are held; a pair of one of each kind moves them at second order,
    which costs its slope.
    """

    def __init__(self, sigma: Array, slope: Array) -> None:
        kept = sigma > 0
        self.slope = np.where(kept, 1.0, 0.0)
        both = np.add.outer(sigma, sigma)
        pulled = np.where(kept, 1.0, slope)
        across = np.where(kept[:, None], pulled, pulled[:, None])
        moves = kept[:, None] | kept
        inverse = np.divide(1.0, both, out=np.zeros_like(both), where=moves)
        self.same = np.where(moves, inverse, HELD)
        self.swapped = -across * inverse


_Penalty = _Smoothed | _OfRank


class _Iterate:
    """A point, its probabilities, and the part of the value that has no kink."""

    def __init__(self, term: SoftmaxTerm, at: Logits, matrix: Array, width: float) -> None:
        self.at, self.matrix, self.width = at, matrix, width
        self.p = term.probabilities(at)
        self.smooth = term.value(at, self.p) + float(
            np.where(term.apart, (term.sizes - 1) * term.roots, 0.0) @ at.gaps
        )

    def value(self, sigma: Array) -> float:
        return self.smooth + float(np.sqrt(sigma**2 + self.width**2).sum())


class GroupPath:
    """Follows the path for one problem; see the module's docstring."""

    def __init__(self, term: SoftmaxTerm) -> None:
        self.term = term
        with np.errstate(divide="ignore"):
            units = 1 / np.sqrt(np.outer(term.counts * term.sizes, term.sizes))  # x = T * units
        self.units = np.where(np.isfinite(units), units, 0.0)
        self.gap_price = np.where(term.apart, (term.sizes - 1) * term.roots, 0.0)

    def minimise(self, tol: float) -> Reduced:
        """The minimiser to a relative gap of `tol`, or the best that rounding allows."""
        best: Reduced | None = None
        for pace in PACES:
            found = self._walk(pace, tol)
            best = found if best is None or found.gap < best.gap else best
            if best.converged:
                break
        assert best is not None
        return best

    def _walk(self, pace: Pace, tol: float, max_steps: int = 300) -> Reduced:
        term = self.term
        width = 10.0 * float(np.sqrt(term.counts.max() * term.classes))
        now = _Iterate(term, term.start(), np.zeros_like(self.units), width)
        best: Reduced | None = None
        attempts = 0
        for steps in range(1, max_steps + 1):
            previous = now.width
            now, sigma = self._advance(now, pace)
            cost = _Smoothed(sigma, now.width).cost
            if now.width == previous or cost > LATE * now.value(sigma):
                continue
            if self._told_apart(sigma, now.width) or cost < 0.1 * tol * now.value(sigma):
                best, attempts = (
                    self._polished(now, steps, tol, best),
                    attempts + (cost < tol * now.value(sigma)),
                )
                if best.converged or attempts == ATTEMPTS:
                    break
        return best or self._polished(now, max_steps, tol, None)

    @staticmethod
    def _told_apart(sigma: Array, width: float) -> bool:
        """Whether it shows which singular values vanish with the smoothing."""
        return not bool(((sigma > APART[0] * width) & (sigma < APART[1] * width)).any())

    def _advance(self, now: _Iterate, pace: Pace) -> tuple[_Iterate, Array]:
        """One step along the path: the new point and its singular values."""
        U, sigma, Vt = np.linalg.svd(now.matrix)
        penalty = _Smoothed(sigma, now.width)
        newton = _Newton(self, now, penalty, U, Vt.T)
        width = now.width
        if newton.decrement() <= max(pace.near * penalty.cost, ROUNDING * now.value(sigma)):
            width *= pace.fall
            newton.right.flat[:: len(sigma) + 1] -= (width - now.width) * penalty.fall
        change, step = newton.solve(pace.forcing)
        start = _Iterate(self.term, now.at, now.matrix, width)
        before = start.value(sigma)
        length = min(1.0, LARGEST_CHANGE / max(step.largest_change(), LEAST))
        for _ in range(40):
            new = _Iterate(
                self.term, now.at.stepped(step, length), now.matrix + length * change, width
            )
            sigma = np.linalg.svd(new.matrix, compute_uv=False).astype(np.float64)
            if new.value(sigma) <= before * (1 + ROUNDING):
                break
            length /= 2
        return new, sigma

    def _polished(self, now: _Iterate, steps: int, tol: float, best: Reduced | None) -> Reduced:
        """Newton's method on the matrices of the rank that shows, and the best of all points with
        what they prove.
        """
        U, sigma, Vt = np.linalg.svd(now.matrix)
        rank = int((sigma > math.sqrt(APART[0] * APART[1]) * now.width).sum())
        at, matrix = now.at, now.matrix
        for extra in range(POLISHING):
            U, sigma, Vt = np.linalg.svd(matrix)
            sigma[rank:] = 0.0
            matrix = (U * sigma) @ Vt
            at = Logits(at.gaps, matrix * self.units, at.bias)
            point = _Iterate(self.term, at, matrix, 0.0)
            found = self._proved(point, (U, sigma, Vt.T), steps + extra, tol)
            if best is not None and not found.gap < best.gap:
                break
            best = found
            if best.converged and extra:
                break
            U, V, slope = self._turned(point, U, Vt.T, rank)
            change, step = _Newton(self, point, _OfRank(sigma, slope), U, V).solve(LAST_FORCING)
            matrix, at = matrix + change, at.stepped(step, 1.0)
        assert best is not None
        return best

    def _turned(self, point: _Iterate, U: Array, V: Array, rank: int) -> tuple[Array, Array, Array]:
        """The bases, turned to the data's singular vectors where T is zero, and the slopes that the
        data pull at there.
        """
        pull = -self.term.gradient(point.at, point.p).means * self.units
        X, slope, Yt = np.linalg.svd(U[:, rank:].T @ pull @ V[:, rank:])
        U, V = U.copy(), V.copy()
        U[:, rank:], V[:, rank:] = U[:, rank:] @ X, V[:, rank:] @ Yt.T
        return U, V, np.concatenate([np.ones(rank), slope])

    def _proved(
        self, point: _Iterate, factors: tuple[Array, Array, Array], steps: int, tol: float
    ) -> Reduced:
        """The point with its value and what it proves."""
        proof, value = dual(self.term, point.p), self.term.mu * point.value(factors[1])
        data = float(self.term.weights @ point.p.loss)
        converged = value - proof.bound <= tol * value
        gaps = np.maximum(point.at.gaps, 0.0)  # at a group's threshold rounding decides the sign
        return Reduced(
            gaps, *factors, point.at.bias, value, data, proof.bound, proof.ratio, steps, converged
        )


class _Newton:
    """The linear system of one step, (D + S) M = right, in the singular bases U, V."""

    def __init__(
        self, path: GroupPath, now: _Iterate, penalty: _Penalty, U: Array, V: Array
    ) -> None:
        term = path.term
        self.units, self.penalty, self.U, self.V = path.units, penalty, U, V
        self.gradient, self.curvature = term.gradient(now.at, now.p), Curvature(term, now.p)
        self.gap_slope = np.where(term.apart, self.gradient.gaps + path.gap_price, 0.0)
        means, self.bias = self.curvature.reduced(self.gradient, self.gap_slope)
        self.right = -(U.T @ (means * self.units) @ V)
        self.right.flat[:: len(self.right) + 1] -= penalty.slope
        data = (U**2).T @ (self.curvature.diagonal() * self.units**2) @ V**2
        self.same = data + penalty.same
        self.determinant = self.same * self.same.T - penalty.swapped**2

    def decrement(self) -> float:
        """About twice what a step may lower the value by."""
        matrix = float((self.right * self.precondition(self.right)).sum())
        gaps = float(self.gap_slope @ self.curvature.gap_answer(self.gap_slope))
        return matrix - gaps - float(self.gradient.bias @ self.bias)

    def product(self, M: Array) -> Array:
        entries = self.curvature.product(self.U @ M @ self.V.T * self.units) * self.units
        product: Array = (
            self.penalty.same * M + self.penalty.swapped * M.T + self.U.T @ entries @ self.V
        )
        return product

    def precondition(self, M: Array) -> Array:
        solved: Array = (self.same.T * M - self.penalty.swapped * M.T) / self.determinant
        return solved

    def solve(self, forcing: float) -> tuple[Array, Logits]:
        """The change of T and the step of the point."""
        change = (
            self.U
            @ conjugate_gradients(self.product, self.precondition, self.right, forcing)
            @ self.V.T
        )
        return change, self.curvature.step(change * self.units, self.bias, self.gap_slope)


def conjugate_gradients(
    product: Callable[[Array], Array],
    precondition: Callable[[Array], Array],
    right: Array,
    forcing: float,
    most: int = 200,
) -> Array:
    """x with product(x) = right, to a residual of `forcing` relative to the start's in the
    preconditioner's norm.
    """
    x, residual = np.zeros_like(right), right.copy()
    direction = z = precondition(residual)
    energy = first = float((residual * z).sum())
    for _ in range(most):
        if energy <= forcing**2 * first:
            break
        image = product(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        x += energy / curvature * direction
        residual -= energy / curvature * image
        z = precondition(residual)
        energy, previous = float((residual * z).sum()), energy
        direction = z + energy / previous * direction
    return x
