"""Neural-collapse metrics NC1-NC3 in O(K d^2), without a K x K array and without cancellation at
collapse.

A Gram matrix X = A B' of K x d matrices is K x K. Split A = A_c + 1 a' and B = B_c + 1 b' into
centred rows and a multiple of the ones vector, and X falls into four orthogonal parts: A_c B_c',
A_c b 1', 1 (B_c a)', (a.b) 1 1'. Their norms need d x d matrices only, and the distance to a target
that is a multiple of P = I - 1 1'/K is a distance inside the first part, where small differences
are formed before they are squared. The short form |X/|X| - E|^2 = 2 - 2 <X, E>/|X| loses half the
digits near zero and is used only where rank d < K - 1 keeps the distance away from zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.metrics.rows import View
from ufm_fast.metrics.statistics import Centre, ClassMoments


def nc1_pinv(statistics: ClassMoments) -> float:
    """NC1 = tr(Sigma_W Sigma_B^+)/K, Sigma_B about the sample mean. Source: Zhu et al., arXiv
    2105.02375.
    """
    return _trace_with_pinv(statistics, "samples") / statistics.classes


def nc1_trace(statistics: ClassMoments) -> float:
    """NC1 = tr(Sigma_W Sigma_B^+), not divided by K, Sigma_B about the mean of class means.

    Source: Papyan, Han and Donoho, arXiv 2008.08186 (their code).
    """
    return _trace_with_pinv(statistics, "classes")


def nc1_quotient(statistics: ClassMoments) -> float:
    """NC1 = tr Sigma_W / tr Sigma_B, Sigma_B about the sample mean.

    Source: Tirer, Huang and Niles-Weed, arXiv 2210.16658.
    """
    within = statistics.within_factor.square().sum() / statistics.samples
    between = statistics.sample_centred_means.factor.square().sum() / statistics.classes
    return float(within / between)


def _trace_with_pinv(statistics: ClassMoments, centre: Centre) -> float:
    """tr(Sigma_W Sigma_B^+) as sum_i v_i' Sigma_W v_i / lambda_i over the kept eigenpairs of
    Sigma_B; nan if it is zero.

    Kept are at most K - 1 (the rank that Sigma_B can have), and of these the eigenvalues above d
    eps lambda_1, the cut of torch.linalg.pinv and scipy.linalg.pinv. They come from a triangular
    factor, so the smallest kept one still has half the digits.
    """
    _, singular, right = torch.linalg.svd(
        statistics.means_about(centre).factor, full_matrices=False
    )
    eigenvalues = singular.square() / statistics.classes
    cut = statistics.dim * torch.finfo(torch.float64).eps * eigenvalues[0]
    kept = eigenvalues[: statistics.classes - 1] > cut
    if not bool(kept.any()):
        return math.nan
    kept_rows = right[: kept.numel()][kept]
    scatter = (statistics.within_factor @ kept_rows.T).square().sum(0) / statistics.samples
    return float((scatter / eigenvalues[: kept.numel()][kept]).sum())


def nc2(matrix: View, *, frame: bool = False) -> float:
    """Distance of a normalised Gram matrix to the simplex ETF, or to an orthogonal frame.

    NC2 = |X/|X| - E| with X = A A' and E = (I - 1 1'/K)/sqrt(K-1);
    frame=True: E = I/sqrt(K). Norms are Frobenius. matrix: A (K x d) about the origin that the
    convention asks for: W as it stands (Zhu et al., arXiv 2105.02375) or with its mean row
    subtracted (Zhou et al., arXiv 2210.02192). A frame: Dang et al., arXiv 2301.00437 (no bias). 0
    at collapse, at least sqrt((K-1-d)/(K-1)) for d < K-1, nan for a zero matrix.
    """
    return _deviation(matrix, matrix, frame)


def nc3(classifier: View, means: View, *, frame: bool = False) -> float:
    """Distance of the normalised W M' to the simplex ETF, or to an orthogonal frame.

    NC3 = |X/|X| - E| with X = W M', E as for `nc2`; at a minimum of the squared error without a
    bias, whose frame is orthogonal, nothing is centred.

    classifier, means: K x d. M about the sample mean and W as it stands: Zhu et al., arXiv
    2105.02375; W centred too: Zhou et al., arXiv 2210.02192; neither centred: Yaras et al., arXiv
    2209.09211.
    """
    return _deviation(classifier, means, frame)


def nc3_papyan(classifier: View, means: View) -> float:
    """Self-duality |W/|W| - M/|M||^2, M centred class means. Source: Papyan, Han and Donoho, arXiv
    2008.08186.
    """
    scales = [view.rows.length(view.norms) for view in (classifier, means)]
    pairs = zip(classifier.blocks(), means.blocks(), strict=True)
    squares = ((w / scales[0] - m / scales[1]).square().sum() for w, m in pairs)
    return float(classifier.rows.total(sum(squares, torch.zeros_like(scales[0]))))


def nc_bias(classifier: View, centre: Tensor, bias: Tensor | None = None) -> float:
    """|W mu_G + b|: zero where the bias only undoes the global mean. b is zero if it is not given.

    centre: mu_G (d,). Source: Zhu et al., arXiv 2105.02375 (their code).
    """
    none = centre.new_zeros(0)
    logits = torch.cat([none, *(block @ centre for block in classifier.blocks())])
    return float(classifier.rows.length(logits if bias is None else logits + bias))


def _deviation(left: View, right: View, frame: bool) -> float:
    """|X/|X| - (plane P + line 1 1'/K)| for X = left right', part by part as in the module's
    docstring.
    """
    count = left.count
    plane = 1 / math.sqrt(count if frame else count - 1)
    core = (left.rows.factor @ right.rows.factor.T).square().sum()
    cross = count * (left.rows.factor @ right.offset).square().sum()
    cross = cross + count * (right.rows.factor @ left.offset).square().sum()
    ones = count * (left.offset @ right.offset)
    scale = (core + cross + ones.square()).sqrt()
    square = plane_distance(left, right, scale, plane) + cross / scale.square()
    square = square + (ones / scale - (plane if frame else 0.0)).square()
    return float(square.sqrt())


def plane_distance(left: View, right: View, scale: Tensor | float, plane: Tensor | float) -> Tensor:
    """|A_c B_c'/scale - plane P|^2 for the centred rows of two K x d matrices, without a K x K
    array.

    Equal matrices with d <= K-1: the non-zero spectra of A_c A_c' and A_c'A_c agree, so it is a d x
    d distance plus (K-1-d) plane^2. K <= d+1: entry by entry, a block of rows of the K x K matrix
    at a time, which is no larger than the Gram matrix of the other case. Otherwise expanded: rank d
    < K-1 keeps it above plane^2, where nothing cancels.
    """
    count, dim = left.count, left.dim
    if left.rows is right.rows and dim < count:
        deviation = left.rows.gram / scale - plane * torch.eye(
            dim, dtype=torch.float64, device=left.offset.device
        )
        return deviation.square().sum() + (count - 1 - dim) * plane**2
    if count <= dim + 1:
        return _plane_distance_by_entries(left, right, scale, plane)
    core = (left.rows.factor @ right.rows.factor.T).square().sum() / scale**2
    return core - 2 * plane * left.rows.inner(right.rows) / scale + plane**2 * (count - 1)


def _plane_distance_by_entries(
    left: View, right: View, scale: Tensor | float, plane: Tensor | float
) -> Tensor:
    columns = right.rows.take(slice(None)).T
    total, start = torch.zeros_like(left.offset[0]), 0
    for block in left.rows.centred():
        tile = block @ columns / scale + plane / left.count
        tile.diagonal(start).sub_(plane)
        total, start = total + tile.square().sum(), start + block.shape[0]
    return total
