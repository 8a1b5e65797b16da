"""Cross-entropy with any class counts, where theory still reaches: the collapsed solution, the
limit of no penalty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ufm_fast.theory.arguments import NO_BIAS, check_bias_penalty, check_counts, nuclear_coefficient
from ufm_fast.theory.convex import Array


def collapsed_ce(
    counts: Sequence[int] | Tensor, lambda_w: float, lambda_h: float, lambda_b: float = NO_BIAS
) -> tuple[float, Tensor | None] | None:
    """(minimum, bias) where W = H = 0 is the minimiser of cross-entropy, None where it is not. Any
    counts, any d.

    Zero logits are optimal iff mu >= |G|_op, G the K x K matrix of columns sqrt(n_k)/N (p - e_k)
    with p the softmax of the bias alone: p = 1/K without a bias, n/N with a free one (which needs
    samples in every class), and the root of p_k - n_k/N + lambda_b b_k = 0 with a penalised one
    (None where it is not found to 1e-10). Our derivation.
    """
    values, group, sizes = torch.unique(
        check_counts(counts), return_inverse=True, return_counts=True
    )
    n, size = values.numpy(), sizes.to(torch.float64).numpy()
    total = float(n @ size)
    check_bias_penalty(lambda_b)
    if n[0] == 0 and lambda_b == 0:
        return None
    p, bias = _bias_alone(n / total, size, lambda_b)
    mu = nuclear_coefficient(lambda_w, lambda_h)
    inside = (
        float(np.sqrt(n[size > 1]).max(initial=0.0)) / total
    )  # G on zero-sum vectors of each group
    if mu < inside or mu < _shared_norm(np.sqrt(n), np.sqrt(size), p) / total:
        return None
    value = float((size * n / total) @ -np.log(p)) + (
        0.0 if bias is None else _ridge(lambda_b, size, bias)
    )
    if (
        bias is not None and lambda_b > 0
    ):  # found by iteration: by strong convexity no further above than this
        rest = p - n / total + lambda_b * bias
        if float(size @ (rest * rest)) / (2 * lambda_b) > 1e-10 * value:
            return None
    return value, None if bias is None else torch.from_numpy(bias)[group]


def _shared_norm(roots: Array, root_sizes: Array, p: Array) -> float:
    """Norm of N G on the groups' unit vectors: diag(sqrt(n)) minus a rank-one matrix."""
    return float(np.linalg.norm(np.diag(roots) - np.outer(root_sizes * p, root_sizes * roots), 2))


def _ridge(lambda_b: float, size: Array, bias: Array) -> float:
    return lambda_b / 2 * float(size @ (bias * bias))


def _bias_alone(share: Array, size: Array, lambda_b: float) -> tuple[Array, Array | None]:
    """Probabilities and bias, a number a group, that minimise sum_k share_k (lse(b) - b_k) +
    lambda_b/2 |b|^2.
    """
    if lambda_b == NO_BIAS:
        return np.full(len(size), 1 / float(size.sum())), None
    if lambda_b == 0:
        bias = np.log(share)
        return share, bias - float(size @ bias) / float(size.sum())
    bias = np.zeros(len(size))

    def softmax(b: Array) -> tuple[Array, float]:
        weight = np.exp(b - b.max())
        scale = float(size @ weight)
        return weight / scale, math.log(scale) + float(b.max()) - float(
            (size * share) @ b
        ) + _ridge(lambda_b, size, b)

    p, value = softmax(bias)
    for _ in range(200):
        gradient = p - share + lambda_b * bias
        hessian = np.diag(p + lambda_b) - np.outer(p, size * p)
        step = -np.linalg.solve(hessian, gradient)
        decrement, length = float(-(size * gradient) @ step), 1.0
        while (
            decrement > 1e-10 * value
            and length > 1e-9
            and softmax(bias + length * step)[1] > value - 1e-4 * length * decrement
        ):
            length /= 2
        bias = bias + length * step
        p, value = softmax(bias)
        if decrement <= 1e-28 * value:
            break
    return p, bias


def seli_spectrum(counts: Sequence[int] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions that W and H approach as the penalties vanish: the SVD V diag(s) U' of (I - J/K)
    diag(sqrt(n_k)).

    W W' tends to a multiple of V diag(s) V', and the class means' Gram, weighted by sqrt(n_k n_l),
    to one of U diag(s) U'; the zero singular value is left out. The approach is logarithmic in the
    penalty: at any usable penalty compare with `two_group_ce`, not with this limit. Setting: arXiv
    2208.05512.
    """
    roots = check_counts(counts).sqrt()
    classes = len(roots)
    left, sigma, right = torch.linalg.svd(torch.diag(roots) - roots / classes)
    return left[:, : classes - 1], sigma[: classes - 1], right[: classes - 1].T


@torch.no_grad()
def seli_distance(weight: Tensor, counts: Tensor) -> float:
    """| W W'/|W W'| - L/|L| | to the limit L = V diag(s) V' of no penalty (`seli_spectrum`); K x K
    matrices.

    nan for W = 0.
    """
    V, s, _ = seli_spectrum(counts)
    limit = (V * s) @ V.T
    gram = (weight.double() @ weight.double().T).cpu()
    return float((gram / gram.norm() - limit / limit.norm()).norm())


@torch.no_grad()
def seli_logit_distance(
    weight: Tensor,
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> float:
    """| X/|X| - S/|S| | of the logits X = D^1/2 H W' of rows that stand for ``counts`` samples
    each, D = diag(counts), and of the simplex-encoded labels S_r = sqrt(n_r) (e_y - 1/K), which
    they tend to. O((N + K) d min(K, d)); nan for zero logits. total: sums over the rows here to
    sums over all, of which others may be on other ranks.
    """
    W, H, n = weight.double(), features.double(), counts.double()
    weighted = H * n.sqrt()[:, None]
    if len(W) < W.shape[1]:
        squares = [(part @ W.T).square().sum() for part in torch.split(weighted, 1024)]
        size = total(torch.stack(squares).sum()).sqrt()
    else:
        size = (total(weighted.T @ weighted) * (W.T @ W)).sum().clamp_min(0.0).sqrt()
    inner = total((weighted * (n.sqrt()[:, None] * (W - W.mean(0))[labels])).sum())
    cosine = float(inner / (size * (total(n.sum()) * (1.0 - 1.0 / len(W))).sqrt()))
    return math.sqrt(max(0.0, 2.0 - 2.0 * cosine)) if math.isfinite(cosine) else math.nan
