"""The one-vs-rest margin of a classifier: how far each row lies from the convex hull of the others.

rho_k = dist(w_k, conv{w_j : j != k}) = max over unit h of min_(j != k) <w_k - w_j, h>, the best
margin that a unit feature can have for class k. It is the quantity of softmax codes (K > d + 1),
where no two classes can be as far apart as in a simplex. With G the rows w_k - w_j, 1/rho_k is the
least |x| with G x >= 1 (Lawson and Hanson's least distance problem), which is a non-negative least
squares problem: scipy's. Source: Jiang et al., arXiv 2310.05351 (GNC2).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ufm_fast.metrics.checks import check_matrix
from ufm_fast.metrics.pairwise import Estimate

#: Up to this many classes every row is solved.
EXACT_CLASSES = 2000


def margin_of(weight: Tensor, k: int) -> float:
    """rho_k of W (K x d), float64; 0 where w_k lies in the hull of the others."""
    from scipy.optimize import nnls  # type: ignore[attr-defined]

    rows = weight.double().cpu().numpy()
    G = rows[k] - np.delete(rows, k, 0)
    scale = float(np.abs(G).max())
    if scale == 0.0:
        return 0.0
    E = np.vstack([G.T / scale, np.ones(len(G))])
    f = np.zeros(len(E))
    f[-1] = 1.0
    u, _ = nnls(E, f, maxiter=30 * E.shape[1])
    r = E @ u - f
    if -r[-1] <= 1e-13:
        return 0.0
    return float(scale / np.linalg.norm(r[:-1] / r[-1]))


def margins(weight: Any, rows: Tensor | None = None) -> Tensor:
    """rho of each of the ``rows`` (default: all), float64."""
    weight = check_matrix(weight, "weight")
    chosen = range(weight.shape[0]) if rows is None else rows.tolist()
    return torch.tensor([margin_of(weight, int(k)) for k in chosen], dtype=torch.float64)


def one_vs_rest(
    weight: Any, *, sample: int = 64, seed: int = 0, exact_classes: int = EXACT_CLASSES
) -> tuple[float, Estimate]:
    """(least margin, mean margin) over the classes: exact up to ``exact_classes``, beyond that of
    ``sample`` random rows.

    Of a sample the least margin is an upper bound on the true one, and the mean has its standard
    error.
    Errors: InputError, InputTypeError for a weight that is no matrix.
    """
    weight = check_matrix(weight, "weight")
    K = weight.shape[0]
    if exact_classes >= K:
        found = margins(weight)
        return float(found.min()), Estimate(float(found.mean()))
    generator = torch.Generator().manual_seed(seed)
    found = margins(weight, torch.randperm(K, generator=generator)[:sample])
    error = float(found.std()) / math.sqrt(sample) * math.sqrt(1.0 - sample / K)
    return float(found.min()), Estimate(float(found.mean()), error)
