"""Small convex problems solved to rounding: the finite-dimensional oracles that symmetry leaves of a softmax UFM."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

GOLDEN = (math.sqrt(5) - 1) / 2
LARGEST_GAP_CHANGE = 4.0  # nats a Newton step may move a logit gap by: beyond, the softmax's curvature says nothing


@dataclass(frozen=True, eq=False)
class GapProblem:
    """min over v in R^n of  sum_i w_i log1p(sum_j m_ij exp(-(L_i v)_j)) + c.v + 1/2 v'diag(q)v + mu |diag(r) v|.

    weights w (I,), multiplicity m (I, J), gaps L (I, J, n), linear c (n,), quadratic q (n,), norm r (n,).
    The first sum is the data term: row i is a kind of sample, with m_ij competitors at a logit gap (L_i v)_j below
    the target. The last term is the nuclear norm of the direction that the variables with r > 0 share.
    """

    weights: Array
    multiplicity: Array
    gaps: Array
    linear: Array
    quadratic: Array
    norm: Array
    mu: float

    def smooth(self, v: Array) -> tuple[float, Array, Array]:
        """Value, gradient and Hessian of everything but the norm."""
        with np.errstate(over="ignore", invalid="ignore"):
            mass = self.multiplicity * np.exp(-(self.gaps @ v))
            total = 1 + mass.sum(1)
            p = mass / total[:, None]
            value = self.weights @ np.log1p(mass.sum(1)) + self.linear @ v + 0.5 * self.quadratic @ (v * v)
        pulls = np.einsum("ij,ijn->in", p, self.gaps)
        gradient = -self.weights @ pulls + self.linear + self.quadratic * v
        second = np.einsum("i,ij,ijm,ijn->mn", self.weights, p, self.gaps, self.gaps)
        hessian = second - np.einsum("i,im,in->mn", self.weights, pulls, pulls) + np.diag(self.quadratic)
        return float(value), gradient, hessian

    def __call__(self, v: Array) -> tuple[float, Array, Array]:
        """Value, gradient and Hessian of the whole; the norm's derivatives are left out where it is zero."""
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

        The norm has a kink at zero, and whether the minimum sits on it is decided first, by the dual norm of the
        gradient there (exact, as the problem is convex). Off the kink everything is smooth and Newton's method ends
        at rounding level.
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

    def _leave_kink(self, v: Array, direction: Array) -> Array:
        """A point of lower value along `direction`, so that a monotone method never meets the kink again."""
        start = self(v)[0]
        step = LARGEST_GAP_CHANGE / max(float(np.abs(self.gaps @ direction).max()), 1e-300)
        for _ in range(200):
            if self(v + step * direction)[0] < start:
                return v + step * direction
            step /= 2
        return v  # the descent is below rounding: the kink is the minimum to working precision

    def _newton(self, v: Array, free: NDArray[np.bool_]) -> Array:
        """Damped Newton on the free variables; the last steps go by the gradient, which the value cannot resolve."""
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
            length = min(1.0, LARGEST_GAP_CHANGE / max(float(np.abs(self.gaps @ step).max()), 1e-300))
            endgame = decrement <= 1e-10 * abs(value)
            for _ in range(60):
                new_value, new_gradient, new_hessian = self(v + length * step)
                if endgame or new_value <= value - 1e-4 * length * decrement:
                    break
                length /= 2
            before, after = (float(np.linalg.norm(scale * g[free])) for g in (gradient, new_gradient))
            if endgame and not after < before:
                return v
            v = v + length * step
            value, gradient, hessian = new_value, new_gradient, new_hessian
        return v


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
    """The minimiser in [low, high] of a unimodal function, to the square root of rounding (its value: to rounding)."""
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
