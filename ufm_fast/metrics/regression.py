"""Neural regression collapse: where features and weights of a model with target vectors have come
to lie.

With t outputs, features h_i centred and of length one, P_t the projection onto their first t
principal components, P_W the projection onto the rows of W, and Sigma the targets' covariance,

    nrc1   mean_i |h_i - P_t h_i|^2      features lie in as many dimensions as there are outputs
    nrc2   mean_i |h_i - P_W h_i|^2      which are those of the rows of W
    nrc3   min over gamma of |WW'/|WW'| - A/|A||^2,  A = [Sigma^(1/2) - gamma^(1/2) I]_+

All are zero at a minimum (gamma is then N lambda_w lambda_h). The papers have A without the
positive part, which is the same up to the least eigenvalue of Sigma; beyond it the minimum drops
directions, and this form is still its own. Models without a bias take no mean off the targets:
their Sigma is the second moment, and features are not centred (``centred``).

Where targets repeat, as encoded labels do, ``nc1_pinv`` is that of `METRICS` with a class for each
distinct target.

Source: Andriopoulos et al., arXiv 2409.04180; for this model arXiv 2505.09308.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.dense_targets import DenseTargets, Spectrum
from ufm_fast.layout import Layout
from ufm_fast.spread import Spread
from ufm_fast.tall import triangular

#: What each number says, for tables.
REGRESSION = {
    "nrc1": "share of the features' directions outside their first t principal components",
    "nrc2": "share of the features' directions outside the rows of W",
    "nrc3": "distance of WW' from the square root of the targets' covariance, less a constant",
}
#: Rows and directions shorter than this share of the longest count as none.
_NOTHING = 1e-12
_WHAT = "metrics"  # in the counts of bytes that are sent


@torch.no_grad()
def regression_metrics(
    features: Tensor,
    weight: Tensor | None,
    targets: DenseTargets,
    counts: Tensor,
    *,
    centred: bool,
    layout: Layout | None = None,
) -> dict[str, float]:
    """``nrc1`` of features (R, d), row r standing for counts[r] samples; with W (t, d) also
    ``nrc2`` and ``nrc3``. On several ranks features and W are this one's blocks, targets and counts
    those of all rows, and every rank has the same numbers.

    nan where no feature, or no row of W, has a direction.
    """
    spread = Spread(layout, _WHAT)
    own = counts if layout is None else counts[layout.row_part]
    share = own.to(features.device).double() / float(counts.sum())
    H = features.double()
    H = H - spread.total(share @ H) if centred else H
    length = torch.linalg.vector_norm(H, dim=1)
    has = length > _NOTHING * _most(length, spread)
    share = share[has] / spread.total(share[has].sum())
    unit, t = H[has] / length[has, None], targets.values.shape[1]
    components = _components((H * own.to(H)[:, None].sqrt())[has], t, spread)
    found = {"nrc1": _outside(unit, share, components, spread)}
    if weight is not None:
        of_classifier = _components(weight.double(), t, spread)
        found["nrc2"] = _outside(unit, share, of_classifier, spread)
        found["nrc3"] = weight_structure(weight, targets.spectrum(counts, centred=centred), layout)
    numbers = torch.tensor(list(found.values()), dtype=torch.float64)
    return dict(zip(found, spread.first(numbers).tolist(), strict=True))


def _most(values: Tensor, spread: Spread) -> Tensor:
    """The largest of numbers >= 0, or 0."""
    return spread.most(torch.cat([values.new_zeros(1), values]).max())


def _components(rows: Tensor, most: int, spread: Spread) -> Tensor:
    """The first directions of rows, (d, r): at most ``most``, none shorter than ``_NOTHING`` of the
    longest.
    """
    R = triangular(rows, spread.mesh)
    if not R.numel():
        return rows.T[:, :0]
    _, sizes, Vh = torch.linalg.svd(R, full_matrices=False)
    sizes, Vh = (spread.first(x) for x in (sizes, Vh))
    basis: Tensor = Vh[: min(most, int((sizes > _NOTHING * sizes[0]).sum()))].T
    return basis


def _outside(unit: Tensor, share: Tensor, basis: Tensor, spread: Spread) -> float:
    """Weighted mean of |h - B B'h|^2 over unit rows."""
    there, apart = spread.total(share.sum()), (unit - unit @ basis @ basis.T).square().sum(1)
    outside = float(spread.total(share @ apart))
    return outside if basis.numel() and float(there) else math.nan


@torch.no_grad()
def weight_structure(weight: Tensor, spectrum: Spectrum, layout: Layout | None = None) -> float:
    """nrc3 of W (t, d). The angle's cosine is N(g)/D(g) |WW'|^-1 with g = gamma^(1/2), N = sum_j
    q_j (s_j - g)_+ and D^2 = sum_j (s_j - g)_+^2, q_j = |W'v_j|^2: its maxima between two of the
    s_j are known.
    """
    spread = Spread(layout, _WHAT)
    W, s = weight.double(), spectrum.values.to(weight.device).double()
    size = float(torch.linalg.matrix_norm(spread.total(W.T @ W)))
    if size == 0 or float(s[:1].sum()) == 0:
        return math.nan
    s = s / s[0]
    V = spread.here(spectrum.V)
    q = spread.total(V.to(W.device).T @ W).square().sum(1)
    m, S1, S2 = torch.arange(1, len(s) + 1, device=s.device), s.cumsum(0), s.square().cumsum(0)
    Q, P = q.cumsum(0), (q * s).cumsum(0)
    lower = torch.cat([s[1:], s.new_zeros(1)])
    between = torch.nan_to_num((Q * S2 - P * S1) / (Q * S1 - P * m))
    g = torch.cat([torch.minimum(torch.maximum(between, lower), s), lower])
    left = (s[:, None] - g).clamp_min(0.0)
    cosine = (q @ left / left.norm(dim=0).clamp_min(1e-300) / size).max()
    return max(0.0, 2.0 - 2.0 * float(cosine))
