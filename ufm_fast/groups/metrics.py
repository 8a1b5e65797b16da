"""The metrics of `ufm_fast.metrics`, and two distances to SELI, of a grouped minimum."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ufm_fast.class_groups import Array
from ufm_fast.groups.blocks import Blocks, angles, distance, frame, simplex
from ufm_fast.groups.geometry import Geometry
from ufm_fast.groups.minimum import GroupMinimum


def _norm_variation(rows: Blocks) -> float:
    mean = float(rows.sizes @ rows.norms) / rows.count
    return (
        math.sqrt(float(rows.sizes @ (rows.norms - mean) ** 2) / (rows.count - 1)) / mean
        if mean > 0
        else math.nan
    )


def _effective_rank(rows: Blocks) -> float:
    values, times = rows.spectrum
    p = values / float(times @ values) if values.any() else values * math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return math.exp(-float(times @ np.where(p == 0, 0.0, p * np.log(p))))


def _participation(rows: Blocks) -> float:
    values, times = rows.spectrum
    scaled = values / values.max() if values.any() else values * math.nan
    return float(times @ scaled**2) ** 2 / float(times @ scaled**4)


def _stable_rank(rows: Blocks) -> float:
    values, times = rows.spectrum
    present = values[times > 0]
    return float(times @ (values / present.max()) ** 2) if present.any() else math.nan


def _cosine_std(rows: Blocks) -> float:
    mean = rows.over_pairs(rows.cosines)
    return math.sqrt(rows.over_pairs((rows.cosines - mean) ** 2))


def _equiangularity(rows: Blocks) -> float:
    return rows.over_pairs(np.abs(rows.cosines + 1 / (rows.count - 1)))


def _largest_cosine(rows: Blocks) -> float:
    if not rows.norms.all():
        return math.nan
    return float(np.nanmax(rows.cosines))


def _within_spread(rows: Blocks) -> float:
    """Of features that have collapsed: zero, unless two class means coincide, or all of them."""
    return 0.0 if rows.norm > 0 else math.nan


def _cdnv(geometry: Geometry) -> float:
    minimum = geometry.minimum
    return (
        math.nan
        if bool((minimum.collapsed & geometry.present).any())
        else _within_spread(geometry.centred_means)
    )


def _nc2(rows: Blocks, target: Callable[[Array], Blocks] = simplex) -> float:
    return distance(rows.times(rows), target(rows.sizes))


def _nc3(rows: Blocks, means: Blocks, target: Callable[[Array], Blocks] = simplex) -> float:
    return distance(rows.times(means), target(rows.sizes))


def _self_duality(rows: Blocks, means: Blocks) -> float:
    return rows.over(rows.norm).minus(means.over(means.norm)).norm ** 2


_OF_ROWS: dict[str, Callable[[Blocks], float]] = {
    "norm_variation": _norm_variation,
    "cosine_mean": lambda rows: rows.over_pairs(rows.cosines),
    "cosine_std": _cosine_std,
    "effective_rank": _effective_rank,
    "participation_ratio": _participation,
    "stable_rank": _stable_rank,
    "equiangularity": _equiangularity,
    "max_cosine": _largest_cosine,
}


def _of_classifier(measure: Callable[[Blocks], float]) -> Callable[[Geometry], float]:
    return lambda geometry: measure(geometry.classifier)


def _of_means(measure: Callable[[Blocks], float]) -> Callable[[Geometry], float]:
    return lambda geometry: measure(geometry.centred_means)


#: A row for each metric of `ufm_fast.metrics.METRICS`, by the same name, and the two distances to
#: SELI.
GROUP_METRICS: dict[str, Callable[[Geometry], float]] = {
    "nc1_pinv": lambda g: _within_spread(g.sample_centred_means),
    "nc1_trace": lambda g: _within_spread(g.centred_means),
    "nc1_quotient": lambda g: _within_spread(g.sample_centred_means),
    "nc2_classifier": lambda g: _nc2(g.classifier),
    "nc2_classifier_centred": lambda g: _nc2(g.classifier.centred),
    "nc2_classifier_frame": lambda g: _nc2(g.classifier, frame),
    "nc2_means": lambda g: _nc2(g.centred_means),
    "nc2_means_uncentred": lambda g: _nc2(g.means),
    "nc2_means_frame": lambda g: _nc2(g.means, frame),
    "nc3": lambda g: _nc3(g.head, g.sample_centred_means),
    "nc3_centred": lambda g: _nc3(g.head.centred, g.sample_centred_means),
    "nc3_uncentred": lambda g: _nc3(g.head, g.means),
    "nc3_frame": lambda g: _nc3(g.head, g.means, frame),
    "nc3_papyan": lambda g: _self_duality(g.head, g.centred_means),
    "self_duality_gap": lambda g: g.duality[0],
    "self_duality_cosine": lambda g: 1 - g.duality[0],
    "self_duality_gap_uncentred": lambda g: (
        float(g.head.sizes @ angles(g.head, g.means)) / g.head.count
    ),
    "self_duality_variance": lambda g: g.duality[1],
    "nc_bias": lambda g: g.nc_bias,
    **{f"{name}_classifier": _of_classifier(measure) for name, measure in _OF_ROWS.items()},
    **{f"{name}_means": _of_means(measure) for name, measure in _OF_ROWS.items()},
    "balancedness": lambda g: 0.0,  # both factors are built from the same singular values
    "balancedness_relative": lambda g: 0.0 if g.classifier.norm > 0 else math.nan,
    "nc4": lambda g: g.nc4,
    "cdnv": _cdnv,
    "seli_classifier": lambda g: g.seli[0],
    "seli_means": lambda g: g.seli[1],
}


def group_metrics(minimum: GroupMinimum) -> dict[str, float]:
    """Every metric of a grouped minimum: those of `ufm_fast.metrics.collect` at its lifted point,
    without lifting it.

    Pairwise ones are exact at any K. With fewer than two classes with samples, those of the
    classifier alone. nan means undefined, as there; metrics whose names begin with ``seli`` are the
    distances to the limit of no penalty.
    """
    geometry = Geometry(minimum)
    alone = geometry.means.count < 2
    return {
        name: float(compute(geometry))
        for name, compute in GROUP_METRICS.items()
        if not alone or name.endswith(("_classifier", "_classifier_centred", "_classifier_frame"))
    }
