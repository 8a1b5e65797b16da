"""Matrices over classes in groups, whose rows are alike within groups: two small arrays each.

Such a K x d matrix is, on zero-sum vectors of group g, `within[g]` times an isometry, and on the
groups' unit vectors the G x r matrix `shared`. Products, Gram matrices and the simplex are such
block pairs themselves, and a Frobenius norm is sum_g (K_g - 1) within_g^2 + |shared|^2, so that
distances are formed from differences and keep their digits at collapse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ufm_fast.class_groups import Array


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


def simplex(sizes: Array) -> Blocks:
    """E = (I - 1 1'/K)/sqrt(K - 1)."""
    classes, roots = float(sizes.sum()), np.sqrt(sizes)
    scale = 1 / math.sqrt(classes - 1)
    return Blocks(
        sizes,
        np.full(len(sizes), scale),
        scale * (np.eye(len(sizes)) - np.outer(roots, roots) / classes),
    )


def frame(sizes: Array) -> Blocks:
    """I/sqrt(K)."""
    scale = 1 / math.sqrt(float(sizes.sum()))
    return Blocks(sizes, np.full(len(sizes), scale), scale * np.eye(len(sizes)))


def distance(product: Blocks, target: Blocks) -> float:
    """|X/|X| - E|, nan for X = 0."""
    return product.over(product.norm).minus(target).norm


def angles(w: Blocks, m: Blocks) -> Array:
    """1 - cos of a class' two rows, (G,), as half a squared distance of unit vectors."""
    with np.errstate(divide="ignore", invalid="ignore"):
        within = (w.within / w.norms - m.within / m.norms) ** 2 * (w.sizes - 1)
        shared = ((w.shared / w.norms[:, None] - m.shared / m.norms[:, None]) ** 2).sum(1)
    gaps: Array = (within + shared) / w.sizes / 2
    return gaps
