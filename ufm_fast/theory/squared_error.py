"""Minima of the squared-error UFM, l = 1/2 |z - e_y|^2, in closed form.

f = (1/2N) sum_i |W h_i + b - e_{y_i}|^2 + lambda_W/2 |W|^2 + lambda_H/2 |H|^2 + lambda_b/2 |b|^2.
Notation: mu = sqrt(lambda_W lambda_H), tau = N mu, and for n samples in each class c = K sqrt(n) mu
= tau/sqrt(n). The weighted logits Z sqrt(n_k) are a soft-thresholding at tau of their targets'
singular values sqrt(n_k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.theory.arguments import (
    NO_BIAS,
    check_bias_penalty,
    check_counts,
    check_integer,
    check_positive,
    nuclear_coefficient,
)
from ufm_fast.theory.convex import Array
from ufm_fast.theory.softmax import class_price

#: With a bias, the distinct counts up to which `mse_bound` takes the singular values of a matrix of
#: that order.
MOST_GROUPS = 1024
ROUNDING = 1e-14  # relative, of a singular value decomposition


def kept_classes(
    counts: Sequence[int] | Tensor, dim: int, lambda_w: float, lambda_h: float
) -> Tensor:
    """Indices of the classes that a bias-free minimiser represents: the d largest, of those with
    sqrt(n_k) > tau.
    """
    n = check_counts(counts)
    largest = torch.sort(n, descending=True, stable=True).indices[: check_integer("dim", dim, 1)]
    tau = float(n.sum()) * nuclear_coefficient(lambda_w, lambda_h)
    return largest[n[largest].sqrt() > tau]


def mse_minimum(
    counts: Sequence[int] | Tensor, dim: int, lambda_w: float, lambda_h: float
) -> float:
    """Minimum without a bias, for any counts (empty classes too) and any dimension.

    f* = sum over kept classes of (tau sqrt(n_k) - tau^2/2)/N + sum over the others of n_k/(2N). The
    minimiser is an orthogonal frame, W h_k = (1 - tau/sqrt(n_k)) e_k; balanced with d >= K: f* = c
    - c^2/2 for c <= 1. The same holds under H >= 0. Source: arXiv 2202.08087 for balanced classes;
      imbalance and d < K are our derivation.
    """
    n = check_counts(counts)
    total = float(n.sum())
    tau = total * nuclear_coefficient(lambda_w, lambda_h)
    kept = n[kept_classes(n, dim, lambda_w, lambda_h)]
    represented = float((kept.sqrt() * tau - tau * tau / 2).sum())
    return (represented + (total - float(kept.sum())) / 2) / total


def balanced_mse_minimum(
    classes: int,
    per_class: int,
    dim: int,
    lambda_w: float,
    lambda_h: float,
    lambda_b: float = NO_BIAS,
) -> float:
    """Minimum with a bias and balanced classes, any dimension; lambda_b = 0 is a free bias,
    math.inf none.

    With kappa = (1 + lambda_b)/lambda_b and r = min(d, K-1):
    f* = (r/K)(c - c^2/2) + (K-1-r)/(2K) + g,  where g = (c - kappa c^2/2)/K if d >= K and kappa c <
    1, else 1/(2 K kappa). The means are a centred simplex unless the first case of g holds.
    Source: arXiv 2202.08087 (free bias) and 2203.01238 (penalised); d < K is our derivation.
    """
    c = min(classes * class_price(classes, per_class, lambda_w, lambda_h), 1.0)
    directions = min(check_integer("dim", dim, 1), classes - 1)
    centred = directions * (c - c * c / 2) + (classes - 1 - directions) / 2
    leak = bias_leak(lambda_b)  # 1/kappa
    if dim >= classes and c < leak:
        return (centred + c - c * c / (2 * leak)) / classes
    return (centred + leak / 2) / classes


def bias_leak(lambda_b: float) -> float:
    """1/kappa = lambda_b/(1 + lambda_b), the part of the squared mean that a bias leaves to W and
    H: 0 free, 1 none.
    """
    check_bias_penalty(lambda_b)
    return 1 - 1 / (1 + lambda_b) if lambda_b > 1 else lambda_b / (1 + lambda_b)


def biased_mse_minimum(
    counts: Sequence[int] | Tensor, lambda_w: float, lambda_h: float, lambda_b: float = 0.0
) -> float:
    """Minimum with a bias and any counts, for d >= K: a convex problem in the bias alone,

    F(b) = sum_j huber(sigma_j((I - b 1') diag(sqrt(n_k)))) + lambda_b/2 |b|^2, huber(x) = x^2/(2N)
    for x <= tau and (tau x - tau^2/2)/N beyond. A free bias has b = n/N exactly. Our derivation.
    """
    values, sizes = torch.unique(check_counts(counts), return_counts=True)
    return BiasedSpectrum(
        values.numpy(), sizes.numpy(), nuclear_coefficient(lambda_w, lambda_h), lambda_b
    ).value


def mse_bound(
    counts: Sequence[int] | Tensor, lambda_w: float, lambda_h: float, lambda_b: float = NO_BIAS
) -> float:
    """A lower bound on f for any d, W, H and b, within rounding of the minimum for d >= K; -inf
    past ``MOST_GROUPS`` counts.

    The dual rows are those of the minimiser itself, with no rounding of a point in them: G = -U
    min(sigma, N mu) V'/N, so
    |G| <= mu, of the targets' U sigma V' = (I - b 1') diag(sqrt(n_k)). Without a bias their value
    is ``mse_minimum``, and with a free one, b = n/N, F(b) of ``biased_mse_minimum``; F has
    curvature lambda_b at least, so a penalised one takes
    |grad F|^2 / (2 lambda_b) off it. An allowance for rounding is subtracted. lambda_b = 0: free,
    ``NO_BIAS``: none.
    """
    n = check_counts(counts)
    mu = nuclear_coefficient(lambda_w, lambda_h)
    values, sizes = torch.unique(n[n > 0], return_counts=True)  # empty classes take part in nothing
    if not math.isfinite(check_bias_penalty(lambda_b)):
        return mse_minimum(n, len(n), lambda_w, lambda_h) * (1.0 - ROUNDING)
    if len(values) > MOST_GROUPS:
        return -math.inf
    return BiasedSpectrum(values.numpy(), sizes.numpy(), mu, lambda_b).lower_bound


class BiasedSpectrum:
    """The squared-error minimum with a bias, for groups of `sizes` classes with `values` samples
    each.

    Classes with equal counts have equal bias, so the K x K matrix is block-diagonal: sqrt(n_g) on
    zero-sum vectors of group g, and a G x G matrix M on the groups' unit vectors. Attributes:
    `value`, `bias` (G,), `tau`, M's singular value decomposition `left` (G x G), `sigma` (G,),
    `right` (G x G, columns), and `shortfall`, by which `value` may lie above the minimum at most.
    """

    def __init__(self, values: Array, sizes: Array, mu: float, lambda_b: float) -> None:
        self.samples = float(values @ sizes)
        self.tau = self.samples * mu
        self._roots = np.sqrt(np.asarray(values, dtype=np.float64))
        self._weights = np.sqrt(np.asarray(sizes, dtype=np.float64)) * self._roots
        if not math.isfinite(check_bias_penalty(lambda_b)):
            raise InputError("lambda_b=inf is a problem without a bias: use mse_minimum")
        self._penalty = float(lambda_b)
        bias = (
            self._roots * self._weights / self.samples / (1 + lambda_b)
        )  # times sqrt(sizes): keeps norms
        bias = bias if lambda_b == 0 else self._newton(bias)
        self.left, self.sigma, right = self._decompose(bias)
        self.right = right.T
        self.bias = bias / np.sqrt(sizes)
        self.shortfall = (
            float(np.sum(self._derivatives(bias)[0] ** 2)) / (2 * lambda_b) if lambda_b > 0 else 0.0
        )
        apart = float((sizes - 1) @ self._huber(self._roots))
        self.value = apart + self._objective(bias)

    @property
    def lower_bound(self) -> float:
        """`value` less `shortfall` and an allowance for rounding."""
        bound = self.value - self.shortfall
        # A singular value is off by as much as the entries' parts are rounded, and the value by
        # that times its slope.
        off = ROUNDING * 2.0 * float(self._roots.max())
        slope = float(np.minimum(self.sigma + off, self.tau).sum()) / self.samples
        return max(0.0, bound - ROUNDING * bound - off * slope)

    def _huber(self, sigma: Array) -> Array:
        clipped = np.minimum(sigma, self.tau)
        return clipped * (sigma - clipped / 2) / self.samples

    def _decompose(self, bias: Array) -> tuple[Array, Array, Array]:
        return np.linalg.svd(np.diag(self._roots) - np.outer(bias, self._weights))

    def _objective(self, bias: Array) -> float:
        return float(self._huber(self._decompose(bias)[1]).sum() + self._penalty / 2 * bias @ bias)

    def _derivatives(self, bias: Array) -> tuple[Array, Array]:
        """Gradient, and Hessian by the derivative of a spectral function (divided differences of
        min(sigma, tau)).
        """
        left, sigma, right = self._decompose(bias)
        clipped, w = np.minimum(sigma, self.tau), right @ self._weights
        gradient = -left @ (clipped * w) / self.samples + self._penalty * bias
        total, difference = np.add.outer(sigma, sigma), np.subtract.outer(sigma, sigma)
        kept = (sigma > self.tau).astype(float)
        close = np.abs(difference) <= 1e-9 * total
        symmetric = np.where(
            close, 1 - kept, np.subtract.outer(clipped, clipped) / np.where(close, 1, difference)
        )
        skew = np.add.outer(clipped, clipped) / np.where(total > 0, total, 1) + (total == 0)
        core = np.diag((symmetric + skew) @ (w * w)) + np.outer(w, w) * (symmetric - skew)
        hessian = left @ core @ left.T / (2 * self.samples) + self._penalty * np.eye(len(bias))
        return gradient, hessian

    def _newton(self, bias: Array) -> Array:
        """Semismooth Newton with backtracking, ended when the gradient stops falling at rounding
        level.
        """
        value = self._objective(bias)
        gradient, hessian = self._derivatives(bias)
        for _ in range(100):
            step = -np.linalg.solve(hessian, gradient)
            decrement, length = float(-gradient @ step), 1.0
            endgame = decrement <= 1e-11 * value
            while (
                not endgame
                and length > 1e-9
                and self._objective(bias + length * step) > value - 1e-4 * length * decrement
            ):
                length /= 2
            candidate = bias + length * step
            new_gradient, new_hessian = self._derivatives(candidate)
            if endgame and not np.linalg.norm(new_gradient) < np.linalg.norm(gradient):
                break
            bias, value = candidate, self._objective(candidate)
            gradient, hessian = new_gradient, new_hessian
        return bias


def rescaled_mse_minimum(
    classes: int,
    per_class: int,
    lambda_w: float,
    lambda_h: float,
    target_weight: float = 1.0,
    target: float = 15.0,
) -> float:
    """Minimum of the rescaled loss l = (1/K) [k (z_y - M)^2 + sum_{j != y} z_j^2] (no 1/2),
    balanced, no bias, d >= K.

    f* = min over alpha, beta of (1/K)[k (alpha + beta - M)^2 + (K-1) beta^2] + s [(K-1)|alpha| +
    |alpha + K beta|], with k = `target_weight` and M = `target` (defaults: those of the paper's
    code). The objective is a piecewise quadratic, whose minimum is the best stationary point of its
    nine pieces. Loss: arXiv 2210.02192; the reduction is our derivation.
    """
    s = class_price(classes, per_class, lambda_w, lambda_h)
    k, m = check_positive("target_weight", target_weight), check_positive("target", target)
    # In x = (alpha, alpha + K beta) the data term is |A x - t|^2 and the penalty a weighted l1
    # norm.
    on, off = math.sqrt(k / classes), math.sqrt((classes - 1) / classes) / classes
    A = np.array([[on * (1 - 1 / classes), on / classes], [-off, off]])
    t, price = np.array([on * m, 0.0]), np.array([s * (classes - 1), s])
    best = math.inf
    for signs in product((-1.0, 0.0, 1.0), repeat=2):
        used = np.array(signs) != 0
        x = np.zeros(2)
        if used.any():
            a = A[:, used]
            x[used] = np.linalg.solve(a.T @ a, a.T @ t - price[used] * np.array(signs)[used] / 2)
        best = min(best, float(np.sum((A @ x - t) ** 2) + price @ np.abs(x)))
    return best
