"""Small convex problems solved to rounding: the finite-dimensional oracles that symmetry leaves of
a softmax UFM.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GOLDEN = (math.sqrt(5) - 1) / 2
#: Nats, beside its own size, that a Newton step may move a logit gap by: beyond, its curvature says
#: nothing.
LARGEST_GAP_CHANGE = 4.0


@dataclass(frozen=True, eq=False)
class GapProblem:
    """min over v of  sum_i w_i [log1p(sum_j m_ij exp(-(L_i v)_j)) + e sum_j m_ij (L_i v)_j]
                      + c.|v| + 1/2 v'diag(q)v + mu |diag(r) v|.

    weights w (I,), multiplicity m (I, J), gaps L (I, J, n), price c (n,), quadratic q (n,), norm r
    (n,); e = `smoothing` / K. The first sum is the data term: row i is a kind of sample, with m_ij
    competitors at a logit gap (L_i v)_j below the target. The prices are those of singular values,
    which `minimise` finds positive; the last term is the nuclear norm of the direction that the
    variables with r > 0 share.
    """

    weights: Array
    multiplicity: Array
    gaps: Array
    price: Array
    quadratic: Array
    norm: Array
    mu: float
    smoothed: float = 0.0  # smoothing / K

    @cached_property
    def linear(self) -> Array:
        """What is linear in v >= 0: the prices and the smoothing."""
        pull: Array = np.einsum("i,ij,ijn->n", self.weights, self.multiplicity, self.gaps)
        return self.price + self.smoothed * pull

    def smooth(self, v: Array) -> tuple[float, Array, Array]:
        """Value, gradient and Hessian of everything but the norm."""
        with np.errstate(over="ignore", invalid="ignore"):
            mass = self.multiplicity * np.exp(-(self.gaps @ v))
            total = 1 + mass.sum(1)
            p = mass / total[:, None]
            value = (
                self.weights @ np.log1p(mass.sum(1))
                + self.linear @ v
                + 0.5 * self.quadratic @ (v * v)
            )
        pulls = np.einsum("ij,ijn->in", p, self.gaps)
        gradient = -self.weights @ pulls + self.linear + self.quadratic * v
        second = np.einsum("i,ij,ijm,ijn->mn", self.weights, p, self.gaps, self.gaps)
        hessian = (
            second - np.einsum("i,im,in->mn", self.weights, pulls, pulls) + np.diag(self.quadratic)
        )
        return float(value), gradient, hessian

    def __call__(self, v: Array) -> tuple[float, Array, Array]:
        """Value, gradient and Hessian of the whole; the norm's derivatives are left out where it is
        zero.
        """
        value, gradient, hessian = self.smooth(v)
        weighted = self.norm * self.norm * v
        length = float(np.linalg.norm(self.norm * v))
        if length > 0:
            value += self.mu * length
            gradient = gradient + self.mu / length * weighted
            curvature = np.diag(self.norm**2) - np.outer(weighted, weighted) / length**2
            hessian = hessian + self.mu / length * curvature
        return value, gradient, hessian

    def minimise(self, free: NDArray[np.bool_]) -> Array:
        """The minimiser, with the variables outside `free` held at zero.

        The norm has a kink at zero, and whether the minimum sits on it is decided first, by the
        dual norm of the gradient there (exact, as the problem is convex). Off the kink everything
        is smooth and Newton's method ends at rounding level.
        """
        shared = free & (self.norm > 0)
        v = self._newton(np.zeros_like(self.linear), free & ~shared)
        if not shared.any():
            return v
        pull = np.zeros_like(v)
        pull[shared] = -self.smooth(v)[1][shared] / self.norm[shared]
        if np.linalg.norm(pull) <= self.mu:
            return v
        direction = np.zeros_like(v)
        direction[shared] = pull[shared] / self.norm[shared]
        return self._newton(self._leave_kink(v, direction), free)

    def lower_bound(self, v: Array) -> float:
        """A value that no v goes below, by duality, from the probabilities p at v.

        Competitor j of row i has the dual mass q_ij = e m_ij + theta (p_ij - e m_ij), the target
        the rest:

            f >= sum_i w_i [Entropy(q_i) + sum_j q_ij log m_ij] - theta^2 sum_n a_n^2 / (2
            quadratic_n)

        for the pull a_n = sum_ij w_i (p_ij - e m_ij) L_ijn, as long as theta |a_n| <= c_n and theta
        |a_n / r_n| <= mu together. A free bias, which costs nothing, must not be pulled: the
        stronger side gives way.
        """
        with np.errstate(over="ignore"):
            mass = self.multiplicity * np.exp(-(self.gaps @ v))
        moved = mass / (1 + mass.sum(1, keepdims=True)) - self.smoothed * self.multiplicity
        priced, shared, bent = self.price > 0, self.norm > 0, self.quadratic > 0
        for n in np.flatnonzero(~(priced | shared | bent)):
            moved = self._balanced(moved, self.gaps[:, :, n])
        pull = np.einsum("i,ij,ijn->n", self.weights, moved, self.gaps)
        together = float(np.linalg.norm(pull[shared] / self.norm[shared])) / self.mu
        theta = float(1 / max(1.0, together, *(np.abs(pull[priced]) / self.price[priced])))
        q = self.smoothed * self.multiplicity + theta * moved
        cost = float((pull[bent] ** 2 / (2 * self.quadratic[bent])).sum())
        return float(self.weights @ _entropy(q, self.multiplicity)) - theta**2 * cost

    def _balanced(self, moved: Array, gaps: Array) -> Array:
        """`moved` with the mass on the side that pulls more scaled down until sum_ij w_i moved_ij
        gaps_ij = 0.
        """
        forces = self.weights[:, None] * moved * gaps
        ahead, behind = float(forces[gaps > 0].sum()), -float(forces[gaps < 0].sum())
        level = math.copysign(min(abs(ahead), abs(behind)), ahead) if ahead * behind > 0 else 0.0
        scales = [level / side if side else 0.0 for side in (ahead, behind)]
        scaled: Array = moved * np.where(gaps > 0, scales[0], np.where(gaps < 0, scales[1], 1.0))
        return scaled

    def _leave_kink(self, v: Array, direction: Array) -> Array:
        """A point of lower value along `direction`, so that a monotone method never meets the kink
        again.
        """
        start = self(v)[0]
        step = LARGEST_GAP_CHANGE / max(float(np.abs(self.gaps @ direction).max()), 1e-300)
        for _ in range(200):
            if self(v + step * direction)[0] < start:
                return v + step * direction
            step /= 2
        return v  # the descent is below rounding: the kink is the minimum to working precision

    def _newton(self, v: Array, free: NDArray[np.bool_]) -> Array:
        """Damped Newton on the free variables; the last steps go by the gradient, which the value
        cannot resolve.
        """
        if not free.any():
            return v
        block = np.ix_(free, free)
        value, gradient, hessian = self(v)
        for _ in range(500):
            step = np.zeros_like(v)
            scale = 1 / np.sqrt(np.maximum(np.diag(hessian)[free], 1e-300))
            scaled = hessian[block] * np.outer(scale, scale) + 1e-14 * np.eye(len(scale))
            step[free] = -scale * np.linalg.solve(scaled, scale * gradient[free])
            decrement = float(-gradient @ step)
            moved = np.abs(self.gaps @ step) / (LARGEST_GAP_CHANGE + np.abs(self.gaps @ v))
            length = min(1.0, 1.0 / max(float(moved.max()), 1e-300))
            endgame = decrement <= 1e-10 * abs(value)
            for _ in range(60):
                new_value, new_gradient, new_hessian = self(v + length * step)
                if endgame or new_value <= value - 1e-4 * length * decrement:
                    break
                length /= 2
            before, after = (
                float(np.linalg.norm(scale * g[free])) for g in (gradient, new_gradient)
            )
            if endgame and not after < before:
                return v
            v = v + length * step
            value, gradient, hessian = new_value, new_gradient, new_hessian
        return v


def _entropy(q: Array, multiplicity: Array) -> Array:
    """Entropy of (1 - sum_j q_ij, q_i) plus sum_j q_ij log m_ij, for each row i; all digits as q ->
    0.
    """
    rest = np.minimum(q.sum(1), 1.0)
    target = np.where(rest < 1, -(1 - rest) * np.log1p(-np.minimum(rest, 1 - 1e-16)), 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        others = np.where(q > 0, q * (np.log(multiplicity) - np.log(q)), 0.0)
    total: Array = target + others.sum(1)
    return total


def bisect(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """The root in [low, high] of a decreasing function, to the last bit."""
    while True:
        middle = low + (high - low) / 2
        if not low < middle < high:
            return middle
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle


def golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    """The minimiser in [low, high] of a unimodal function, to the square root of rounding (its
    value: to rounding).
    """
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(120):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2
