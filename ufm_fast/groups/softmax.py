"""Cross-entropy of grouped classes: value, gradient and curvature in the numbers of the groups.

A sample of group g has the logits  x_gh + b_h  at each class of another group h,
x_gg + b_g - a_g/K_g  at the other classes of its own, and a_g more at its target (so x_gh is the
mean logit of group h, and a_g the gap within its own). With weights w_g = n_g K_g / N and smoothing
eps,

    F = (1/mu) { sum_g w_g [log-loss_g + eps (target's logit - mean logit)] + lambda_b/2 sum_g K_g
    b_g^2 }.

Probabilities are kept by their small parts: pi_gh of a whole other group, q_g of the others of the
own group; the target's is what is left. Near collapse these have all their digits, and every
curvature below is a sum of terms of one sign or a difference that rounding cannot spoil: with r =
sum_h pi_h, E = cov-weight and V = variance of the gap's coefficient, eliminating a_g leaves

    row of the Hessian times y:  w pi_h (d_h - kappa D) at h != g,  -w eta D at g,
    d_h = y_h - y_g,  D = sum_h pi_h d_h, kappa = 1 + E^2/V,  eta = 1 - r kappa = p_target q / V
    (kappa = 1, eta = 1 - r where a_g is held at zero).

Our derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ufm_fast.class_groups import Array, ClassGroups

LEAST = 1e-300  # keeps quotients of underflowed probabilities finite


@dataclass(frozen=True, eq=False)
class Logits:
    """A point: gaps a (G,), group means x (G x G, a row a group of samples), bias b (G,)."""

    gaps: Array
    means: Array
    bias: Array

    def stepped(self, step: Logits, length: float) -> Logits:
        gaps, means, bias = (
            self.gaps + length * step.gaps,
            self.means + length * step.means,
            self.bias + length * step.bias,
        )
        return Logits(gaps, means, bias)

    def largest_change(self) -> float:
        """Largest change of a logit difference, as a step."""
        differences = self.means + self.bias - (self.means.diagonal() + self.bias)[:, None]
        return max(float(np.abs(self.gaps).max()), float(np.abs(differences).max()))


@dataclass(frozen=True, eq=False)
class Probabilities:
    """What a sample of each group gives to its target (G,), to the others of its group (G,), to
    each other group (G x G).
    """

    target: Array
    own: Array
    others: Array
    loss: Array

    @property
    def outside(self) -> Array:
        """r_g, all that goes to other groups."""
        total: Array = self.others.sum(1)
        return total


class SoftmaxTerm:
    """F for given groups. `apart`: groups whose classes differ at the minimum, a_g > 0; the others
    have a_g = 0.
    """

    def __init__(self, groups: ClassGroups, mu: float, smoothing: float, lambda_b: float) -> None:
        self.counts, self.sizes, self.mu, self.smoothing = (
            groups.counts,
            groups.sizes,
            mu,
            smoothing,
        )
        self.samples = float(groups.samples)
        self.classes = float(groups.classes)
        self.lambda_b = lambda_b  # 0: free, infinite: none
        self.weights = self.counts * self.sizes / self.samples
        self.roots = np.sqrt(self.counts)
        self.penalty = lambda_b if math.isfinite(lambda_b) else 0.0
        # Zero gaps are optimal from here on, whatever the other logits are: the target and its like
        # are equally probable.
        self.apart = (self.sizes > 1) & (self.roots * (1 - smoothing) > mu * self.samples)

    @property
    def with_bias(self) -> bool:
        return math.isfinite(self.lambda_b)

    def start(self) -> Logits:
        """Gaps as if all classes had the group's count, nothing else."""
        price = np.where(self.apart, self.mu * self.samples / np.maximum(self.roots, 1.0), 1.0)
        off = (
            price + self.smoothing
        ) / self.classes  # the probability of each wrong class, were all classes alike
        gaps = np.where(self.apart, np.log(np.maximum(1 / off - self.classes + 1, 1.0)), 0.0)
        nothing = np.zeros_like(gaps)
        return Logits(gaps, np.zeros((len(gaps), len(gaps))), nothing)

    def probabilities(self, at: Logits) -> Probabilities:
        scores = at.means + at.bias
        target = scores.diagonal() + at.gaps * (1 - 1 / self.sizes)
        leads = scores + np.log(self.sizes) - target[:, None]
        np.fill_diagonal(leads, np.log(np.maximum(self.sizes - 1, LEAST)) - at.gaps)
        shift = np.maximum(
            leads.max(1), 0.0
        )  # zero where the target leads, so that small parts keep their digits
        others = np.exp(leads - shift[:, None])
        own, first = others.diagonal().copy(), np.exp(-shift)
        np.fill_diagonal(others, 0.0)
        off = others.sum(1) + own
        loss = shift + np.where(shift == 0, np.log1p(off), np.log(first + off))
        if self.smoothing:
            loss = loss + self.smoothing * (target - scores @ self.sizes / self.classes)
        total = first + off
        return Probabilities(first / total, own / total, others / total[:, None], loss)

    def value(self, at: Logits, p: Probabilities) -> float:
        """F."""
        ridge = self.penalty / 2 * float(self.sizes @ at.bias**2)
        return (float(self.weights @ p.loss) + ridge) / self.mu

    def gradient(self, at: Logits, p: Probabilities) -> Logits:
        """Gradient of F, in gaps, means and bias."""
        scale = self.weights / self.mu
        means = p.others - self.smoothing * self.sizes / self.classes
        np.fill_diagonal(means, 0.0)
        np.fill_diagonal(means, -means.sum(1))
        gaps = (self.smoothing - p.own - p.outside) * (1 - 1 / self.sizes) - p.own / self.sizes
        means *= scale[:, None]
        return Logits(
            gaps * scale, means, means.sum(0) + self.penalty / self.mu * self.sizes * at.bias
        )


class Curvature:
    """Hessian of F with the gaps (where apart) and the bias eliminated: what is left acts on the
    means.
    """

    def __init__(self, term: SoftmaxTerm, p: Probabilities) -> None:
        self.term, self.p = term, p
        self.scale = term.weights / term.mu
        high, low, r = 1 - 1 / term.sizes, -1 / term.sizes, p.outside
        self.lean = p.target * high + p.own * low  # E
        spread = p.target * p.own + r * (p.target * high**2 + p.own * low**2)  # V
        self.spread = np.maximum(spread, LEAST)
        self.kappa = np.where(term.apart, 1 + self.lean**2 / self.spread, 1.0)
        self.eta = np.where(term.apart, p.target * p.own / self.spread, p.target + p.own)
        self.inverse = self._bias_inverse() if term.with_bias else None

    def rows(self, y: Array) -> Array:
        """The Hessian in x alone, gaps eliminated, times y (G x G, or (G,): the same in every
        row).
        """
        difference = y - (y if y.ndim == 1 else y.diagonal())[:, None]
        weighted = self.p.others * difference
        total = weighted.sum(1)
        product: Array = weighted - self.p.others * (self.kappa * total)[:, None]
        np.fill_diagonal(product, -self.eta * total)
        return product * self.scale[:, None]

    def product(self, y: Array) -> Array:
        """The Hessian in x, gaps and bias eliminated, times y (G x G)."""
        product = self.rows(y)
        return (
            product if self.inverse is None else product - self.rows(self.inverse @ product.sum(0))
        )

    def diagonal(self) -> Array:
        """Diagonal of `rows` (G x G), never negative."""
        pi = self.p.others
        diagonal = pi * np.maximum(1 - self.kappa[:, None] * pi, 0.0)
        np.fill_diagonal(diagonal, self.p.outside * self.eta)
        return diagonal * self.scale[:, None]

    def _bias_inverse(self) -> Array:
        """Inverse of the bias' Hessian, gaps eliminated: a weighted graph's Laplacian, its diagonal
        the sum of its row.
        """
        term, pi = self.term, self.p.others
        across = -(pi * (self.scale * self.eta)[:, None])
        hessian = across + across.T - pi.T @ (pi * (self.scale * self.kappa)[:, None])
        np.fill_diagonal(hessian, 0.0)
        np.fill_diagonal(hessian, -hessian.sum(1))
        if (
            term.lambda_b == 0
        ):  # a common shift changes nothing: give it a curvature of the others' size
            size = np.trace(hessian) / len(hessian) or 1.0
            hessian += size * np.outer(term.sizes, term.sizes) / float(term.sizes @ term.sizes)
        else:
            hessian += np.diag(term.penalty / term.mu * term.sizes)
        root = 1 / np.sqrt(np.maximum(hessian.diagonal(), LEAST))
        scaled = hessian * np.outer(root, root) + 1e-15 * np.eye(len(root))
        inverse: Array = np.linalg.inv(scaled) * np.outer(root, root)
        return inverse

    def reduced(self, gradient: Logits, gap_slope: Array) -> tuple[Array, Array]:
        """(gradient in x with gaps and bias at their best answer, the bias' answer); gap_slope: the
        gaps' whole gradient.
        """
        lean = np.where(self.term.apart, gap_slope * self.lean / self.spread, 0.0)
        change = self.p.others * lean[:, None]
        np.fill_diagonal(change, -self.p.outside * lean)
        means = gradient.means + change
        if self.inverse is None:
            return means, np.zeros_like(lean)
        bias = -self.inverse @ (gradient.bias + change.sum(0))
        return means + self.rows(bias), bias

    def step(self, y: Array, bias: Array, gap_slope: Array) -> Logits:
        """The whole step whose part in x is y: the eliminated numbers' answers to it."""
        if self.inverse is not None:
            bias = bias - self.inverse @ self.rows(y).sum(0)
        whole = y + bias
        total = (self.p.others * (whole - whole.diagonal()[:, None])).sum(1)
        gaps = np.where(self.term.apart, self.lean * total / self.spread, 0.0) + self.gap_answer(
            gap_slope
        )
        return Logits(gaps, y, bias)

    def gap_answer(self, slope: Array) -> Array:
        """The gaps' Newton step where nothing else moves."""
        scale = np.where(self.term.apart, self.scale, 1.0)
        return np.where(self.term.apart, -slope / scale / self.spread, 0.0)
