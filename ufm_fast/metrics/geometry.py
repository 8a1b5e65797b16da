"""Norms, angles, spectra and balance of classifier and class means, in O(K d^2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ufm_fast.metrics.checks import (
    check_counts,
    check_matrix,
    check_positive,
    check_same_device,
    check_same_dim,
)
from ufm_fast.metrics.collapse import plane_distance
from ufm_fast.metrics.rows import View, block_rows
from ufm_fast.spread import ALONE, Spread


def norm_variation(matrix: View) -> float:
    """Coefficient of variation of the row norms: standard deviation (unbiased) over mean. 0 for
    equal norms.

    Source: Papyan, Han and Donoho, arXiv 2008.08186 (equinormness).
    """
    mean, variance = matrix.rows.moments(matrix.norms)
    return float(variance.sqrt() / mean)


def cosine_moments(matrix: View) -> tuple[float, float]:
    """Mean and standard deviation of cos(a_k, a_l) over all pairs k != l, exact, from d x d
    matrices.

    With u the unit rows, C their centred rows and m their mean:
        mean = 1 - t with t = |C|^2/(K-1);   K(K-1) std^2 = |C C' - t P|^2 + 2 K |C m|^2
    The sum over pairs of (cos - mean)^2 is |U U' - t I - (1-t) 1 1'|^2, since its diagonal is zero;
    on the ones vector it vanishes because deviations from a mean sum to zero. nan if a row is zero.
    """
    count, unit = matrix.count, matrix.unit
    none = torch.zeros_like(unit.mean[0])
    square = sum((block.square().sum() for block in unit.centred()), none)
    spread = unit.total(square) / (count - 1)
    plane = plane_distance(unit.about_mean, unit.about_mean, 1.0, spread)
    square = sum(((block @ unit.mean).square().sum() for block in unit.centred()), none)
    cross = 2 * count * unit.total(square)
    return 1 - float(spread), float(((plane + cross).clamp(min=0) / (count * (count - 1))).sqrt())


def effective_rank(matrix: View) -> float:
    """exp of the entropy of the normalised singular values, p_i = s_i/sum s; between 1 and min(K,
    d).

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    singular = matrix.singular_values
    return float(torch.special.entr(singular / singular.sum()).sum().exp())


def participation_ratio(matrix: View) -> float:
    """(sum s_i^2)^2 / sum s_i^4, s the singular values: the number of directions that share the
    energy.
    """
    energy = matrix.singular_values.square()
    return float(energy.sum().square() / energy.square().sum())


def stable_rank(matrix: View) -> float:
    """|A|_F^2 / |A|_2^2. Source: Rudelson and Vershynin, arXiv math/0503442."""
    energy = matrix.singular_values.square()
    return float(energy.sum() / energy.max())


def self_duality(classifier: View, means: View) -> tuple[float, float]:
    """Mean of 1 - cos(w_k, mu_k - mu_G) over classes, and the variance of the cosine (unbiased).

    1 - cos is taken as half the squared distance of the unit vectors, which keeps its digits at
    collapse.
    Source: Jiang et al., arXiv 2310.05351 (GNC3); Wu and Papyan, arXiv 2405.17767 (UNC3). nan if a
    row is zero.
    """
    gaps, start = [classifier.norms.new_zeros(0)], 0
    for w, m in zip(classifier.blocks(), means.blocks(), strict=True):
        rows = slice(start, start + w.shape[0])
        difference = w / classifier.norms[rows, None] - m / means.norms[rows, None]
        gaps.append(difference.square().sum(1) / 2)
        start = rows.stop
    mean, variance = classifier.rows.moments(torch.cat(gaps))
    return float(mean), float(variance)


@torch.no_grad()
def balancedness(
    weight: Any, features: Any, lambda_w: float, lambda_h: float, counts: Any = None
) -> tuple[float, float]:
    """|W'W - (lambda_H/lambda_W) H'H|_F, and the same relative to |W'W|_F: zero at every stationary
    point.

    weight: (K, d). features: (N, d). lambda_w, lambda_h: the penalties lambda/2 |.|^2, positive.
    counts: (N,), row r stands for counts[r] samples, so H'H = sum_r counts[r] h_r h_r'. Rounding
    leaves about 1e-16 |W'W|_F in the first number. Errors: InputError, InputTypeError for shapes,
    dtypes or penalties that do not fit. Source: Zhu et al., arXiv 2105.02375.
    """
    weight, features = check_matrix(weight, "weight"), check_matrix(features, "features")
    check_same_dim(weight, features)
    ratio = check_positive(lambda_h, "lambda_h") / check_positive(lambda_w, "lambda_w")
    counts = None if counts is None else check_counts(counts, features.shape[0])
    check_same_device(weight=weight, features=features, counts=counts)
    return imbalance(weight, features, ratio, counts)


def imbalance(
    weight: Tensor,
    features: Tensor,
    ratio: float,
    counts: Tensor | None,
    over: tuple[Spread, Spread] = (ALONE, ALONE),
) -> tuple[float, float]:
    """`balancedness` of checked inputs; ratio is lambda_H/lambda_W. over: the ranks that hold the
    other rows of each, if there are.
    """
    alone = all(spread.layout is None for spread in over)
    if alone and weight.shape[0] + features.shape[0] < weight.shape[1]:
        # no d x d matrix: coordinates in the span of all rows
        together = torch.cat([weight, features]).to(torch.float64).T
        coordinates = torch.linalg.qr(together, mode="r").R.T
        weight, features = coordinates[: weight.shape[0]], coordinates[weight.shape[0] :]
    gram, of_features = (
        spread.total(part)
        for part, spread in zip(
            (_weighted_gram(weight, None), _weighted_gram(features, counts)), over, strict=True
        )
    )
    difference = torch.linalg.matrix_norm(gram - ratio * of_features)
    return float(difference), float(difference / torch.linalg.matrix_norm(gram))


def _weighted_gram(matrix: Tensor, counts: Tensor | None) -> Tensor:
    size = block_rows(matrix.shape[1])
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64, device=matrix.device)
    for start in range(0, matrix.shape[0], size):
        block = matrix[start : start + size].to(torch.float64)
        total.addmm_(
            (block if counts is None else block * counts[start : start + size, None]).T, block
        )
    return total
