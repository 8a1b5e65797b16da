"""The certificate of a grouped softmax problem: a lower bound on its minimum from G x G numbers,
exact at any K.

With g = p - t the gradient of a sample's loss in its logits, the scaled gradient of the whole
problem has the singular values

    sqrt(n_g)/N |g_target - g_own|, K_g - 1 times each,  and those of
    R_gh = sqrt(n_g K_g / K_h)/N (g's total over group h),

and with theta times the largest at most mu, no (W, H, b) goes below sum_g w_g Entropy(t + theta g),
less what a penalised bias costs; a free bias needs sum_g w_g g = 0, which a flow between groups
restores exactly. (`theory.certificate`, for which this is the case of equal rows; our derivation.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ufm_fast.class_groups import Array
from ufm_fast.groups.softmax import Probabilities, SoftmaxTerm

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Dual:
    """`bound` on the minimum (-inf: none), and `ratio`, the norm of the scaled gradient over mu."""

    bound: float
    ratio: float


@dataclass(frozen=True, eq=False)
class _Rows:
    """A row for each group of samples: the total over its own group's others (G,) and over each
    other group (G x G).
    """

    own: Array
    others: Array
    taken: Array  # from the target beside what the others have


def dual(term: SoftmaxTerm, p: Probabilities) -> Dual:
    """The bound that probabilities p prove."""
    even = term.smoothing / term.classes
    target_rows = even * np.broadcast_to(term.sizes, p.others.shape)
    gradient = p.others - target_rows
    np.fill_diagonal(gradient, 0.0)
    own = p.own - even * (term.sizes - 1)
    total = -gradient.sum(1)  # over the own group, its target included
    surplus = term.weights @ gradient + term.weights * total
    if term.lambda_b == 0 and bool(np.abs(surplus).any()):
        flowed = _balanced(term, p, gradient, own, total, surplus)
        if flowed is None:
            return Dual(-math.inf, math.inf)
        gradient, own, total = flowed
    norm = _norm(term, gradient, own, total)
    theta = min(1.0, term.mu / norm) if norm > 0 else 1.0
    rows = theta * gradient + target_rows
    np.fill_diagonal(rows, 0.0)
    bound = float(term.weights @ _entropy(term.sizes, rows, theta * own + even * (term.sizes - 1)))
    if term.penalty:
        bound -= theta**2 * float((surplus**2 / term.sizes).sum()) / (2 * term.penalty)
    return Dual(bound, norm / term.mu)


def _norm(term: SoftmaxTerm, gradient: Array, own: Array, total: Array) -> float:
    """Norm of the scaled gradient, enlarged by its rounding."""
    matrix = gradient.copy()
    np.fill_diagonal(matrix, total)
    matrix *= np.sqrt(np.outer(term.counts * term.sizes, 1 / term.sizes)) / term.samples
    others = np.maximum(term.sizes - 1, 1)
    within = np.where(
        term.sizes > 1, term.roots / term.samples * np.abs(total - own - own / others), 0.0
    )
    norm = max(float(np.linalg.norm(matrix, 2)), float(within.max()))
    return norm * (1 + 8 * math.sqrt(len(matrix)) * _EPS)


def _entropy(sizes: Array, others: Array, own: Array) -> Array:
    """Entropy of rows whose totals over groups are given, the target having the rest."""
    off = others.sum(1) + own
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = np.where(others > 0, -others * np.log(others / sizes), 0.0).sum(1)
        within = np.where(own > 0, -own * np.log(own / np.maximum(sizes - 1, 1)), 0.0)
        target = np.where(off < 1, -(1 - off) * np.log1p(-off), 0.0)
    result: Array = spread + within + target
    return result


def _balanced(
    term: SoftmaxTerm, p: Probabilities, gradient: Array, own: Array, total: Array, surplus: Array
) -> tuple[Array, Array, Array] | None:
    """Rows whose weighted sum vanishes: from groups with too much mass to those with too little.
    None if that is impossible.

    A group with samples gives its surplus up at its targets, an empty one in every row alike.
    """
    deficit = np.maximum(-surplus, 0.0)
    share = deficit / deficit.sum() if deficit.sum() > 0 else term.sizes / term.classes
    positive = np.maximum(surplus, 0.0)
    empty = term.counts == 0
    level = np.where(empty, positive, 0.0)
    taken = np.where(empty, 0.0, positive) / np.where(empty, 1.0, term.weights)
    if bool((taken > p.target).any()) or bool((p.others[~empty][:, empty] < level[empty]).any()):
        return None
    given = np.outer(taken + level.sum(), share)
    gradient = gradient - level + given
    received = given.diagonal().copy()
    np.fill_diagonal(gradient, 0.0)
    total = total - taken + received
    return gradient, own + received * (1 - 1 / term.sizes), total
