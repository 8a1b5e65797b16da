"""Classifier rows and class means of a grouped minimum, and what is measured of both: exact at any
K, from G x G matrices (`blocks`).
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from ufm_fast.class_groups import Array
from ufm_fast.groups.blocks import Blocks, angles, distance
from ufm_fast.groups.minimum import GroupMinimum
from ufm_fast.theory.frames import scales


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
        return 1 - angles(self.head, self.sample_centred_means)

    @cached_property
    def duality(self) -> tuple[float, float]:
        """Mean of 1 - cos(w_k, mu_k - mu_G), and the unbiased variance of the cosine."""
        gaps, sizes = angles(self.head, self.sample_centred_means), self.head.sizes
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
        first, second = (distance(A.times(A), limit.over(limit.norm)) for A, limit in pairs)
        return first, second
