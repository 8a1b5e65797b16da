"""Closed forms of the squared error to target vectors: soft-thresholded singular values of the
targets themselves.

With s_j the singular values of Y (N x t), of Y - 1 mean' where the bias is free, and r =
min(widths),

    f* = sum_(j <= r) g(s_j) + sum_(j > r) s_j^2 / 2N,      g(s) = min over x >= 0 of (x - s)^2 / 2N
    + (P/2) mu x^(2/P)

(`deep.profile`); of one layer, P = 2, g(s) = (tau s - tau^2/2)/N above tau = N mu and s^2/2N below.
A free bias is the mean: taking it off lowers no singular value's price otherwise (as for labels,
`deep`). A penalised bias has no closed form.

Source: Andriopoulos et al., arXiv 2505.09308 and 2409.04180, for one layer and no singular value
below tau; dropped ones, few dimensions and linear layers are our derivation. Encoded labels:
Massion et al., arXiv 2606.00344.
"""

from __future__ import annotations

import math

import torch

from ufm_fast.dense_targets import DenseTargets
from ufm_fast.problem import Problem
from ufm_fast.theory.deep import LayeredMinimum, profile
from ufm_fast.theory.forms.base import ClosedForm
from ufm_fast.theory.forms.layers import LayeredLogits

_SOURCE = (
    "squared error to target vectors, singular values of the {}targets (arXiv 2505.09308; any d, "
    "depth: our derivation)"
)


def target_vectors(problem: Problem) -> ClosedForm:
    """No bias or a free one, one layer or linear ones of any widths. A minimiser has a row for each
    of ``rows('classes')``.
    """
    rows, widths, free = problem.rows("classes"), problem.trunk.widths, problem.bias == "free"
    assert isinstance(rows.targets, DenseTargets)
    found = rows.targets.spectrum(rows.counts, centred=free)
    N, most = problem.num_samples, min(min(widths), len(found.values))
    s, cost = profile(found.values[:most].numpy(), N, problem.mu, 1 + problem.layers)
    value = math.fsum(cost) + math.fsum(found.values[most:].square().tolist()) / (2 * N)
    kept = torch.from_numpy(s > 0)
    U, V = found.U[:, :most][:, kept], found.V[:, :most][:, kept]
    minimum = LayeredMinimum(value, torch.from_numpy(s)[kept], found.mean, lambda: (V, U))
    logits = LayeredLogits(
        minimum,
        rows.counts,
        widths,
        (problem.lambda_w, problem.lambda_h, *problem.hidden_penalties),
    )
    return ClosedForm(
        value, _SOURCE.format("centred " if free else ""), not bool(kept.any()), logits
    )
