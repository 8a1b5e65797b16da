"""Codes: unit vectors whose inner products take few values. Where K > d + 1 they are what
minimisers look like.

A code u_1 .. u_K is distance invariant with the distribution {(c_j, m_j)} if from each vector m_j
others have the inner product c_j. With W = H = u on the unit spheres of R^d and the factor t on the
logits the cross-entropy is

    f = log(1 + sum_j m_j exp(-t (1 - c_j))),

a feasible value, and the least that is known for the codes here. That no pair (W, H) goes below it
is not proved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ufm_fast.theory.arguments import check_integer, check_positive


@dataclass(frozen=True)
class Code:
    """K unit vectors of R^r, a tight frame that looks alike from each: ``cosines`` c_j of a pair,
    and how many have each.
    """

    name: str
    classes: int
    rank: int
    cosines: Mapping[float, int]

    def value(self, scale: float) -> float:
        """Cross-entropy of W = H = u on the unit sphere, logits scale <u_k, u_l>, in nats."""
        check_positive("scale", scale)
        return math.log1p(
            math.fsum(m * math.exp(-scale * (1 - c)) for c, m in self.cosines.items())
        )


def simplex_code(classes: int) -> Code:
    """The simplex: neural collapse."""
    return Code(
        "simplex (deep neural collapse)", classes, classes - 1, {-1.0 / (classes - 1): classes - 1}
    )


def cross_polytope(classes: int) -> Code | None:
    """Pairs of opposite vectors on K/2 axes; None for odd K."""
    return (
        None
        if classes % 2 or classes < 4
        else Code("cross-polytope", classes, classes // 2, {-1.0: 1, 0.0: classes - 2})
    )


def polygon(classes: int) -> Code:
    """K equidistant vectors of the plane."""
    found: dict[float, int] = {}
    for j in range(1, classes):
        c = round(math.cos(2 * math.pi * j / classes), 15)
        found[c] = found.get(c, 0) + 1
    return Code("regular polygon", classes, 2, found)


_CODES = (
    Code("Petersen code", 10, 4, {-2 / 3: 3, 1 / 6: 6}),
    Code("icosahedron", 12, 3, {-1.0: 1, 5**-0.5: 5, -(5**-0.5): 5}),
    Code("sharp code (5, 16)", 16, 5, {-3 / 5: 5, 1 / 5: 10}),
    Code("sharp code (6, 27)", 27, 6, {-1 / 2: 10, 1 / 4: 16}),
    Code("sharp code (7, 56)", 56, 7, {-1.0: 1, -1 / 3: 27, 1 / 3: 27}),
    Code("sharp code (8, 240)", 240, 8, {-1.0: 1, -1 / 2: 56, 0.0: 126, 1 / 2: 56}),
    Code("sharp code (21, 162)", 162, 21, {-2 / 7: 56, 1 / 7: 105}),
    Code("sharp code (22, 100)", 100, 22, {-4 / 11: 22, 1 / 11: 77}),
)


def codes_of(classes: int) -> list[Code]:
    """Every code for K classes that is known here, the simplex first."""
    found = [
        simplex_code(classes),
        cross_polytope(classes),
        *(code for code in _CODES if code.classes == classes),
    ]
    return [code for code in found if code is not None]


def known_code(classes: int, dim: int) -> Code | None:
    """The code of K vectors that is known here for R^d: of the full dimension, or the simplex; None
    where there is none.
    """
    if check_integer("dim", dim, 1) >= check_integer("classes", classes, 2) - 1:
        return simplex_code(classes)
    if dim == 2:
        return polygon(classes)
    return next((code for code in codes_of(classes) if code.rank == dim), None)


def simplex_level(classes: int) -> float:
    """The least largest cosine of K vectors in any dimension, -1/(K-1), reached for d >= K - 1."""
    return -1.0 / (check_integer("classes", classes, 2) - 1)


def welch_level(classes: int, dim: int) -> float:
    """Welch's lower bound on the largest absolute cosine of K > d vectors: sqrt((K - d) / (d (K -
    1))).
    """
    classes, dim = check_integer("classes", classes, 2), check_integer("dim", dim, 1)
    return math.sqrt(max(classes - dim, 0) / (dim * (classes - 1)))


def hardmax_margin(classes: int, dim: int) -> float | None:
    """The best one-vs-rest margin where it is known: 1 - cos(2 pi/K) for d = 2, K/(K-1) for K <= d
    + 1, 1 up to K = 2d.

    Source: Jiang et al., arXiv 2310.05351.
    """
    if check_integer("dim", dim, 1) == 2 and check_integer("classes", classes, 2) > 3:
        return 1 - math.cos(2 * math.pi / classes)
    if classes <= dim + 1:
        return classes / (classes - 1)
    return 1.0 if classes <= 2 * dim else None


def margin_bounds(classes: int, dim: int) -> tuple[float, float]:
    """Lower and upper bound on the best one-vs-rest margin of K > d + 1 unit vectors, from covering
    and packing of the sphere.

    Source: Jiang et al., arXiv 2310.05351.
    """
    if check_integer("dim", dim, 2) < 2 or check_integer("classes", classes, 2) <= dim + 1:
        raise ValueError("margin_bounds is for K > d + 1 and d >= 2; hardmax_margin knows the rest")
    root, power = math.sqrt(math.pi), 2 / (dim - 1)
    low = (
        0.5
        * (root * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2 + 1)) / classes)
        ** power
    )
    high = (
        2
        * (2 * root * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2)) / classes)
        ** power
    )
    return low, high
