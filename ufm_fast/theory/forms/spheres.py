"""Closed forms on spheres: balanced classes with d >= K - 1 (arXiv 2209.09211)."""

from __future__ import annotations

import math

from ufm_fast.problem import Problem
from ufm_fast.theory.forms.base import ClosedForm
from ufm_fast.theory.frames import UnitSimplex
from ufm_fast.theory.softmax import angular_ce_minimum, normalised_ce_minimum


def sphere_ce(problem: Problem) -> ClosedForm | None:
    """f* = log(1 + (K-1) e^-a) + smoothing (K-1) a / K, a the largest gap t K/(K-1) or the one that
    smoothing wants; with one margin m for all classes (CosFace) and no smoothing a - t m takes its
    place.
    """
    counts, K = problem.counts, problem.num_classes
    if not bool((counts == counts[0]).all()):
        return None
    smoothing, t, adjustment = problem.loss.smoothing, problem.temperature, problem.adjustment
    margin = 0.0 if adjustment.margin is None else float(adjustment.margin[0]) / t
    if adjustment and (
        adjustment.offset is not None or adjustment.scale is not None or adjustment.margin is None
    ):
        return None
    if adjustment.margin is not None and not bool(
        (adjustment.margin == adjustment.margin[0]).all()
    ):
        return None
    value = normalised_ce_minimum(K, t, problem.dim, smoothing, margin)
    if value is None:
        return None
    wanted = math.log1p(K * (1 / smoothing - 1)) if smoothing else math.inf
    form = UnitSimplex(K, problem.dim, t, min(t * K / (K - 1), wanted))
    return ClosedForm(value, "cross-entropy on spheres, simplex (arXiv 2209.09211)", False, form)


def angular_ce(problem: Problem) -> ClosedForm | None:
    """f* = log(1 + (K-1) exp(-t (cos m + 1/(K-1)))) with one margin m in the angle of all classes
    (ArcFace), and no other.
    """
    counts, K, t, angular = (
        problem.counts,
        problem.num_classes,
        problem.temperature,
        problem.angular,
    )
    assert angular is not None
    m = float(angular.angles[0])
    alike = bool((counts == counts[0]).all()) and bool((angular.angles == m).all())
    value = angular_ce_minimum(K, t, problem.dim, m) if alike and not problem.adjustment else None
    if value is None:
        return None
    form = UnitSimplex(K, problem.dim, t, t * K / (K - 1))
    source = "cross-entropy on spheres with margins in the angle, simplex (our derivation)"
    return ClosedForm(value, source, False, form)
