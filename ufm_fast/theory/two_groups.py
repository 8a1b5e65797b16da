"""Imbalanced cross-entropy with two groups of classes: K_A classes of n_A samples and K_B classes
of n_B.

By convexity and symmetry the minimum is reached at logits described by four numbers: in group g,
a_g is the gap to the other classes of the group and y_g = a_g + K_g delta_g, with delta_g the extra
gap to the other group. A bias adds one more, the difference beta = b_A - b_B. With weights w_g =
n_g/N per class, r_g = sqrt(n_g), K = K_A + K_B:

    f = sum_g w_g K_g log[1 + (K_g - 1) exp(-a_g) + K_g' exp(-(a_g (1 - 1/K_g) + y_g/K_g +- beta))]
        + mu {sum_g (K_g - 1) r_g a_g + sqrt(r_A^2 (K_B/K) y_A^2 + r_B^2 (K_A/K) y_B^2)} +
        lambda_b/2 (K_A K_B/K) beta^2

which is convex and solved here to rounding. Our derivation; the setting is that of arXiv
2309.09725, and of arXiv 2101.12699 with constraints in place of penalties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ufm_fast.errors import InputError
from ufm_fast.theory.arguments import (
    NO_BIAS,
    check_bias_penalty,
    check_integer,
    check_positive,
    check_smoothing,
    nuclear_coefficient,
)
from ufm_fast.theory.convex import GapProblem, bisect

Pair = tuple[float, float]


@dataclass(frozen=True)
class TwoGroupMinimum:
    """Minimum of two-group cross-entropy and the spectrum of the logits, in the order (group A,
    group B).

    `within`: singular value of the weighted logits on zero-sum vectors of each group (K_g - 1
    times);
    `shared`: the one on the direction that tells the groups apart; `right`: its right singular
    vector, by its coefficients on the two groups' unit vectors; `bias`: one number a group, or
    None; `shortfall`: by which `value` may lie above the minimum at most, by duality.
    """

    value: float
    classes: tuple[int, int]
    within: Pair
    shared: float
    right: Pair
    bias: Pair | None
    shortfall: float

    @property
    def nuclear_norm(self) -> float:
        return (
            sum((k - 1) * sigma for k, sigma in zip(self.classes, self.within, strict=True))
            + self.shared
        )

    @property
    def rank(self) -> int:
        return sum(
            (k - 1) * (sigma > 0) for k, sigma in zip(self.classes, self.within, strict=True)
        ) + (self.shared > 0)

    @property
    def left(self) -> Pair:
        """Left singular vector of the shared direction, by its coefficients on the two groups' unit
        vectors.
        """
        first, second = self.classes
        return math.sqrt(second / (first + second)), -math.sqrt(first / (first + second))

    def cosine(self, group: int) -> float:
        """Cosine between two classifier rows of one group (0: A, 1: B); 1 is minority collapse, nan
        for zero rows.
        """
        size, sigma = self.classes[group], self.within[group]
        common = self.shared * self.left[group] ** 2 / size
        squared_norm = sigma * (1 - 1 / size) + common
        return (common - sigma / size) / squared_norm if squared_norm > 0 else math.nan


def two_group_ce(
    classes: tuple[int, int],
    per_class: tuple[int, int],
    lambda_w: float,
    lambda_h: float,
    lambda_b: float = NO_BIAS,
    smoothing: float = 0.0,
) -> TwoGroupMinimum:
    """Minimum of cross-entropy for K_A classes of n_A samples and K_B of n_B; see the module's
    docstring.

    lambda_b: 0 is a free bias, math.inf no bias. One of the groups may be without samples (not with
    a free bias, which then has no minimiser). Group g's classes are indistinguishable iff mu >= (1
    - smoothing) sqrt(n_g)/N.
    """
    n = [check_integer(f"per_class[{g}]", per_class[g], 0) for g in (0, 1)]
    total = sum(check_integer(f"classes[{g}]", classes[g], 1) * n[g] for g in (0, 1))
    if total == 0:
        raise InputError(f"per_class={per_class!r}: expected samples in at least one group")
    if min(n) == 0 and lambda_b == 0 and smoothing == 0:
        raise InputError(
            f"per_class={per_class!r}: a free bias has no minimiser where a class has no samples"
        )
    weights, roots = (n[0] / total, n[1] / total), (math.sqrt(n[0]), math.sqrt(n[1]))
    return weighted_two_groups(
        classes, weights, roots, nuclear_coefficient(lambda_w, lambda_h), lambda_b, smoothing
    )


def weighted_two_groups(
    classes: tuple[int, int],
    weights: Pair,
    roots: Pair,
    mu: float,
    lambda_b: float = NO_BIAS,
    smoothing: float = 0.0,
) -> TwoGroupMinimum:
    """The minimum for any data weights w_g and nuclear weights r_g. Solved in v = (a_A, a_B, y_A,
    y_B, beta).
    """
    check_bias_penalty(lambda_b)
    total = sum(classes)
    competitors = np.array(
        [[classes[0] - 1, classes[1]], [classes[1] - 1, classes[0]]], dtype=np.float64
    )
    gaps = np.zeros((2, 2, 5))
    for g in (0, 1):
        gaps[g, 0, g] = 1
        gaps[g, 1, g], gaps[g, 1, 2 + g] = 1 - 1 / classes[g], 1 / classes[g]
        gaps[g, 1, 4] = 0 if lambda_b == NO_BIAS else 1 - 2 * g
    kinds = np.array([weights[g] * classes[g] for g in (0, 1)])
    price = np.array([*(mu * roots[g] * (classes[g] - 1) for g in (0, 1)), 0, 0, 0])
    quadratic = np.array(
        [0, 0, 0, 0, 0 if lambda_b == NO_BIAS else lambda_b * classes[0] * classes[1] / total]
    )
    norm = np.array(
        [
            0,
            0,
            roots[0] * math.sqrt(classes[1] / total),
            roots[1] * math.sqrt(classes[0] / total),
            0,
        ]
    )
    # Where a group collapses is known exactly, so no inequality constraint is left.
    apart = [classes[g] > 1 and weights[g] * (1 - smoothing) > mu * roots[g] for g in (0, 1)]
    free = np.array([*apart, roots[0] > 0, roots[1] > 0, lambda_b != NO_BIAS])
    problem = GapProblem(
        kinds, competitors, gaps, price, quadratic, norm, mu, check_smoothing(smoothing) / total
    )
    v = problem.minimise(free)
    shared = float(np.linalg.norm(norm * v))
    right = (norm * v)[2:4] * [1, -1] / shared if shared > 0 else np.zeros(2)
    bias = (
        None
        if lambda_b == NO_BIAS
        else (float(v[4]) * classes[1] / total, -float(v[4]) * classes[0] / total)
    )
    within = (roots[0] * float(v[0]), roots[1] * float(v[1]))
    value = problem(v)[0]
    shortfall = max(0.0, value - problem.lower_bound(v))
    return TwoGroupMinimum(
        value, classes, within, shared, (float(right[0]), float(right[1])), bias, shortfall
    )


def layer_peeled_two_groups(
    classes: tuple[int, int], ratio: float, energy_w: float, energy_h: float
) -> TwoGroupMinimum:
    """Minimum of the layer-peeled model with class weights 1 (group A) and 1/ratio (group B).

    min sum_A CE + (1/ratio) sum_B CE over class means (a sum, not a mean), subject to (1/K) sum
    |w_k|^2 <= E_W and (1/K) sum |h_k|^2 <= E_H, that is |Z|_* <= K sqrt(E_W E_H). Needs d >= K-1.
    Setting: arXiv 2101.12699; the reduction is our derivation, by bisection on the constraint's
    multiplier.
    """
    total = sum(check_integer(f"classes[{g}]", classes[g], 1) for g in (0, 1))
    weights, roots = (1.0, 1 / check_positive("ratio", ratio)), (1.0, 1.0)
    budget = (
        total
        * math.sqrt(check_positive("energy_w", energy_w))
        * math.sqrt(check_positive("energy_h", energy_h))
    )
    multiplier = layer_peeled_multiplier(classes, weights, budget)
    best = weighted_two_groups(classes, weights, roots, multiplier)
    value = (
        best.value - multiplier * budget
    )  # the multiplier's term is the constraint's, not the loss's
    return TwoGroupMinimum(
        value, classes, best.within, best.shared, best.right, None, best.shortfall
    )


def layer_peeled_multiplier(classes: tuple[int, int], weights: Pair, budget: float) -> float:
    """The price at which the nuclear norm of the two-group minimum equals `budget`."""
    log_price = bisect(
        lambda t: (
            weighted_two_groups(classes, weights, (1.0, 1.0), math.exp(t)).nuclear_norm - budget
        ),
        math.log(min(weights)) - budget / (sum(classes) - 1) - 40,
        math.log(max(weights)) + 1,
    )
    return math.exp(log_price)
