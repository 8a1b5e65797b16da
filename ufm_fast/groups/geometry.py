"""The metrics of `ufm_fast.metrics`, and two distances to SELI, of a grouped minimum: exact at any
K, from G x G matrices.

A K x d matrix whose rows are alike within groups is, on zero-sum vectors of group g, `within[g]`
times an isometry, and on the groups' unit vectors the G x r matrix `shared`. Products, Gram
matrices and the simplex are such block pairs themselves, and a Frobenius norm is sum_g (K_g - 1)
within_g^2 + |shared|^2, so that distances are formed from differences and keep their digits at
collapse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ufm_fast.class_groups import Array
from ufm_fast.groups.minimum import GroupMinimum
from ufm_fast.theory.frames import scales


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix over classes on the left: `within` (G,) on zero-sum vectors, `shared` (G, r) on the
    groups' unit vectors.
    """

    sizes: Array
    within: Array
    shared: Array

    @property
    def count(self) -> float:
        """K, the classes of all groups."""
        return float(self.sizes.sum())

    @cached_property
    def norm(self) -> float:
        """Frobenius norm."""
        return math.sqrt(float((self.sizes - 1) @ self.within**2 + (self.shared**2).sum()))

    def times(self, other: Blocks) -> Blocks:
        """The K x K matrix A B'."""
        return Blocks(self.sizes, self.within * other.within, self.shared @ other.shared.T)

    def minus(self, other: Blocks) -> Blocks:
        return Blocks(self.sizes, self.within - other.within, self.shared - other.shared)

    def over(self, divisor: float) -> Blocks:
        """Divided by a number; nan for zero."""
        factor = 1 / divisor if divisor else math.nan
        return Blocks(self.sizes, self.within * factor, self.shared * factor)

    def about(self, weights: Array) -> Blocks:
        """The rows less their weighted mean; weights (G,): of each class, summing to one over all
        classes.
        """
        roots = np.sqrt(self.sizes)
        return replace(self, shared=self.shared - np.outer(roots, (weights * roots) @ self.shared))

    @property
    def centred(self) -> Blocks:
        return self.about(np.full(len(self.sizes), 1 / self.count))

    @cached_property
    def norms(self) -> Array:
        """(G,): length of a row of each group."""
        norms: Array = np.sqrt(
            (self.within**2 * (self.sizes - 1) + (self.shared**2).sum(1)) / self.sizes
        )
        return norms

    @cached_property
    def cosines(self) -> Array:
        """(G, G): cosine of two rows of different classes; nan for zero rows, and on the diagonal
        for groups of one class.
        """
        inner = self.shared @ self.shared.T / np.sqrt(np.outer(self.sizes, self.sizes)) - np.diag(
            self.within**2 / self.sizes
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines: Array = inner / np.outer(self.norms, self.norms)
        alone = self.sizes == 1
        cosines[alone, alone] = np.nan
        return np.minimum(cosines, 1.0)

    @cached_property
    def pairs(self) -> Array:
        """(G, G): share of the ordered pairs of different classes; they sum to one."""
        shares: Array = (np.outer(self.sizes, self.sizes) - np.diag(self.sizes)) / (
            self.count * (self.count - 1)
        )
        return shares

    def over_pairs(self, values: Array) -> float:
        """Mean over pairs of classes."""
        return float(np.where(self.pairs > 0, values, 0.0).ravel() @ self.pairs.ravel())

    @cached_property
    def spectrum(self) -> tuple[Array, Array]:
        """(singular values, how many times each)."""
        shared = np.linalg.svd(self.shared, compute_uv=False)
        return np.concatenate([np.abs(self.within), shared]), np.concatenate(
            [self.sizes - 1, np.ones_like(shared)]
        )


def _simplex(sizes: Array) -> Blocks:
    """E = (I - 1 1'/K)/sqrt(K - 1)."""
    classes, roots = float(sizes.sum()), np.sqrt(sizes)
    scale = 1 / math.sqrt(classes - 1)
    return Blocks(
        sizes,
        np.full(len(sizes), scale),
        scale * (np.eye(len(sizes)) - np.outer(roots, roots) / classes),
    )


def _frame(sizes: Array) -> Blocks:
    """I/sqrt(K)."""
    scale = 1 / math.sqrt(float(sizes.sum()))
    return Blocks(sizes, np.full(len(sizes), scale), scale * np.eye(len(sizes)))


def _distance(product: Blocks, target: Blocks) -> float:
    """|X/|X| - E|, nan for X = 0."""
    return product.over(product.norm).minus(target).norm


class Geometry:
    """Classifier rows and class means of a grouped minimum. Groups without samples have no
    means.
    """

    def __init__(self, minimum: GroupMinimum) -> None:
        self.minimum = minimum
        groups = minimum.groups
        kept, roots = minimum.sigma > 0, np.sqrt(groups.counts)
        strength = np.sqrt(minimum.sigma[kept])
        within = np.sqrt(roots * minimum.gaps)
        to_classifier, to_features = scales(minimum.lambda_w, minimum.lambda_h)
        self.classifier = Blocks(
            groups.sizes, to_classifier * within, to_classifier * minimum.right[:, kept] * strength
        )
        self.present = present = groups.counts > 0
        per_root = to_features / roots[present]
        self.means = Blocks(
            groups.sizes[present],
            per_root * within[present],
            per_root[:, None] * (minimum.left[:, kept] * strength)[present],
        )
        self.share = (
            groups.counts[present] / groups.samples
        )  # of the samples, a class of each group

    @cached_property
    def head(self) -> Blocks:
        """Rows of W for the classes that have samples."""
        whole, present = self.classifier, self.present
        return Blocks(whole.sizes[present], whole.within[present], whole.shared[present])

    @cached_property
    def centred_means(self) -> Blocks:
        """Class means about the mean of class means."""
        return self.means.centred

    @cached_property
    def sample_centred_means(self) -> Blocks:
        """Class means about the sample mean."""
        return self.means.about(self.share)

    @property
    def self_duality(self) -> Array:
        """cos(w_k, mu_k - mu_G) of a class of each group with samples."""
        return 1 - _angles(self.head, self.sample_centred_means)

    @cached_property
    def duality(self) -> tuple[float, float]:
        """Mean of 1 - cos(w_k, mu_k - mu_G), and the unbiased variance of the cosine."""
        gaps, sizes = _angles(self.head, self.sample_centred_means), self.head.sizes
        mean = float(sizes @ gaps) / self.head.count
        return mean, float(sizes @ (gaps - mean) ** 2) / (self.head.count - 1)

    @cached_property
    def nc_bias(self) -> float:
        """|W mu_G + b|."""
        groups = self.minimum.groups
        centre = (self.share * np.sqrt(self.means.sizes)) @ self.means.shared
        logits = self.classifier.shared @ centre / np.sqrt(groups.sizes)
        bias = 0.0 if self.minimum.bias is None else self.minimum.bias
        return math.sqrt(float(groups.sizes @ (logits + bias) ** 2))

    @cached_property
    def nc4(self) -> float:
        """Share of the samples that classifier and nearest mean give to the same class: the
        target's logit is the largest.

        nan where all class means coincide, so that none is the nearest.
        """
        minimum, groups = self.minimum, self.minimum.groups
        best = np.where(np.isnan(minimum.logits), -np.inf, minimum.logits).max(1)
        agree = minimum.target_logits >= best
        share = float((groups.counts * groups.sizes) @ agree) / groups.samples
        return share if self.centred_means.norm > 0 else math.nan

    @cached_property
    def seli(self) -> tuple[float, float]:
        """Distances |A A'/|A A'| - L/|L|| to the limit of no penalty, of classifier rows and of
        class means times sqrt(n_k).

        L = (X X')^(1/2) and (X' X)^(1/2), X = (I - 1 1'/K) diag(sqrt n). Setting: arXiv 2208.05512.
        """
        groups = self.minimum.groups
        sizes, roots = groups.sizes, np.sqrt(groups.counts)
        unit = np.sqrt(sizes / groups.classes)
        left, sigma, right = np.linalg.svd((np.eye(len(sizes)) - np.outer(unit, unit)) * roots)
        limits = [Blocks(sizes, roots, (v * sigma) @ v.T) for v in (left, right.T)]
        means = np.zeros_like(self.classifier.shared)
        means[self.present] = roots[self.present, None] * self.means.shared
        within = np.zeros_like(roots)
        within[self.present] = roots[self.present] * self.means.within
        found = [self.classifier, Blocks(sizes, within, means)]
        pairs = zip(found, limits, strict=True)
        first, second = (_distance(A.times(A), limit.over(limit.norm)) for A, limit in pairs)
        return first, second


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


def _nc2(rows: Blocks, target: Callable[[Array], Blocks] = _simplex) -> float:
    return _distance(rows.times(rows), target(rows.sizes))


def _nc3(rows: Blocks, means: Blocks, target: Callable[[Array], Blocks] = _simplex) -> float:
    return _distance(rows.times(means), target(rows.sizes))


def _angles(w: Blocks, m: Blocks) -> Array:
    """1 - cos of a class' two rows, (G,), as half a squared distance of unit vectors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        within = (w.within / w.norms - m.within / m.norms) ** 2 * (w.sizes - 1)
        shared = ((w.shared / w.norms[:, None] - m.shared / m.norms[:, None]) ** 2).sum(1)
    gaps: Array = (within + shared) / w.sizes / 2
    return gaps


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
    "nc2_classifier_frame": lambda g: _nc2(g.classifier, _frame),
    "nc2_means": lambda g: _nc2(g.centred_means),
    "nc2_means_uncentred": lambda g: _nc2(g.means),
    "nc2_means_frame": lambda g: _nc2(g.means, _frame),
    "nc3": lambda g: _nc3(g.head, g.sample_centred_means),
    "nc3_centred": lambda g: _nc3(g.head.centred, g.sample_centred_means),
    "nc3_uncentred": lambda g: _nc3(g.head, g.means),
    "nc3_frame": lambda g: _nc3(g.head, g.means, _frame),
    "nc3_papyan": lambda g: _self_duality(g.head, g.centred_means),
    "self_duality_gap": lambda g: g.duality[0],
    "self_duality_cosine": lambda g: 1 - g.duality[0],
    "self_duality_gap_uncentred": lambda g: (
        float(g.head.sizes @ _angles(g.head, g.means)) / g.head.count
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
