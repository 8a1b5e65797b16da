"""Squared error of grouped classes: singular values sqrt(n_g) of zero-sum vectors and those of a G
x G matrix, soft-thresholded.

Without a bias that matrix is diag(sqrt n_g); with one it is (I - b 1')diag(sqrt n) on
group-constant vectors, b the minimiser of a convex function of G numbers
(`theory.squared_error.BiasedSpectrum`). Empty classes take part in nothing.
"""

from __future__ import annotations

import math

import numpy as np

from ufm_fast.class_groups import Array, ClassGroups, Mask
from ufm_fast.groups.path import Reduced
from ufm_fast.theory.squared_error import ROUNDING, BiasedSpectrum


def reduced_squares(groups: ClassGroups, mu: float, lambda_b: float) -> Reduced:
    """The minimum for any bias penalty (0: free, math.inf: none)."""
    counts, sizes = groups.counts, groups.sizes
    roots, tau = np.sqrt(counts), groups.samples * mu
    present = counts > 0
    gaps = np.divide(
        np.maximum(roots - tau, 0.0), roots, out=np.zeros_like(roots), where=present & (sizes > 1)
    )
    if not math.isfinite(lambda_b):
        identity = np.eye(len(counts))
        left, sigma, right, bias = (
            identity,
            np.maximum(roots - tau, 0.0),
            identity,
            np.zeros_like(roots),
        )
        clipped = np.minimum(roots, tau)
        value = float(sizes @ (clipped * (roots - clipped / 2))) / groups.samples
        bound, steps = value * (1 - ROUNDING), 0
    elif lambda_b == 0 and float(sizes[present].sum()) == 1:
        return _fitted_by_bias(present)
    else:
        spectrum = BiasedSpectrum(counts[present], sizes[present], mu, lambda_b)
        left, right = _embedded(spectrum.right, present), _embedded(spectrum.left, present)
        sigma = _padded(np.maximum(spectrum.sigma - tau, 0.0), present)
        bias = np.zeros_like(roots)
        bias[present] = spectrum.bias
        value, bound, steps = spectrum.value, spectrum.lower_bound, 1
    penalty = mu * (float((sizes - 1) @ (roots * gaps)) + float(sigma.sum()))
    ridge = 0.5 * lambda_b * float(sizes @ bias**2) if math.isfinite(lambda_b) else 0.0
    ratio = min(1.0, float(roots.max()) / tau) if tau > 0 else 1.0
    converged = value - bound <= 1e-9 * value
    return Reduced(
        gaps,
        left,
        sigma,
        right,
        bias,
        value,
        value - penalty - ridge,
        bound,
        ratio,
        steps,
        converged,
    )


def _fitted_by_bias(present: Mask) -> Reduced:
    """One class has all samples, and a free bias fits it: the minimum is zero."""
    nothing, identity = np.zeros(len(present)), np.eye(len(present))
    bias = np.where(present, 1.0, 0.0)
    return Reduced(nothing, identity, nothing, identity, bias, 0.0, 0.0, 0.0, 0.0, 0, True)


def _embedded(vectors: Array, present: Mask) -> Array:
    """Singular vectors of the groups with samples as vectors of all groups; an empty group has its
    own, the last.
    """
    whole = np.zeros((len(present), len(present)))
    whole[present, : vectors.shape[1]] = vectors
    whole[~present, vectors.shape[1] :] = 1.0
    return whole


def _padded(sigma: Array, present: Mask) -> Array:
    return np.concatenate([sigma, np.zeros(int((~present).sum()))])
