"""Pick-all-label cross-entropy: every set of m labels equally frequent, for each size m that
occurs.

l_i = sum over k in S_i of CE(z_i, k), N = the number of samples. At the minimum the logits of a set
S are alpha_m (1_S - m/K), m = |S|: the features of a set are the scaled *tag-wise average* of those
of its labels, h_S = (alpha_m/alpha_1) sum over k in S of h_k, and W is a simplex.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ufm_fast.errors import InputError
from ufm_fast.theory.arguments import check_integer, nuclear_coefficient
from ufm_fast.theory.convex import GapProblem


@dataclass(frozen=True)
class PickAllMinimum:
    """The minimum, the slopes alpha_m by set size, and sigma, the weighted logits' (K-1)-fold
    singular value.

    `shortfall`: by which `value` may lie above the minimum at most.
    """

    value: float
    slopes: Mapping[int, float]
    sigma: float
    shortfall: float = 0.0


def pick_all_minimum(
    classes: int, per_set: Mapping[int, int], lambda_w: float, lambda_h: float
) -> PickAllMinimum:
    """Minimum when all C(K, m) sets of size m have n_m = per_set[m] samples each; d >= K-1.

    f* = min over alpha of sum_m (n_m C(K,m)/N) m log[m + (K-m) exp(-alpha_m)]
         + mu (K-1) sqrt(sum_m n_m C(K-2,m-1) alpha_m^2).
    A bias changes nothing. Setting and tag-wise average: arXiv 2310.15903; the convex oracle is our
    derivation.
    """
    check_integer("classes", classes, 2)
    for size, samples in per_set.items():
        check_integer(f"per_set[{size}]", samples, 0)
        if not 1 <= size <= classes:
            raise InputError(
                f"per_set has sets of size {size}: expected sizes from 1 to classes={classes}"
            )
    samples_of = {size: n for size, n in sorted(per_set.items()) if n > 0}
    total = sum(n * math.comb(classes, size) for size, n in samples_of.items())
    if total == 0:
        raise InputError(f"per_set={dict(per_set)!r}: expected at least one set size with samples")
    share = {size: n * math.comb(classes, size) / total for size, n in samples_of.items()}
    floor = math.fsum(share[size] * size * math.log(size) for size in share)
    sizes = [size for size in samples_of if size < classes]  # the set of all labels pulls nowhere
    if not sizes:
        return PickAllMinimum(floor, {size: 0.0 for size in samples_of}, 0.0)
    spread = np.array([math.sqrt(samples_of[m] * math.comb(classes - 2, m - 1)) for m in sizes])
    problem = GapProblem(
        weights=np.array([share[m] * m for m in sizes]),
        multiplicity=np.array([[(classes - m) / m] for m in sizes]),
        gaps=np.eye(len(sizes))[:, None, :],
        price=np.zeros(len(sizes)),
        quadratic=np.zeros(len(sizes)),
        norm=(classes - 1) * spread,
        mu=nuclear_coefficient(lambda_w, lambda_h),
    )
    alpha = problem.minimise(np.ones(len(sizes), dtype=bool))
    slopes = {size: 0.0 for size in samples_of} | dict(zip(sizes, alpha.tolist(), strict=True))
    value = problem(alpha)[0]
    sigma = float(np.linalg.norm(spread * alpha))
    return PickAllMinimum(
        floor + value, slopes, sigma, max(0.0, value - problem.lower_bound(alpha))
    )
