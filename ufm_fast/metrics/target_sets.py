"""Metrics of features whose samples have sets of labels: the tag-wise average and the collapse of
each set.

For a set S of m labels let h_S be the mean of its features, h_k that of the label k alone and s_S =
sum_{k in S} h_k. At the minimum of the pick-all loss h_S = C_m s_S with C_m = alpha_m / alpha_1
(`theory.multilabel`). Means are not centred: the formula is of the features as they are.

    tag_scale{m}, tag_scale{m}_sd   mean and spread over the sets of <h_S, s_S> / |s_S|^2, which is
                                    C_m
    tag_cosine{m}                   mean of cos(h_S, s_S)
    tag_angle_ratio{m}              mean angle(h_S, s_S) over the mean of angle(h_T, s_S) over all
                                    sets T and S of m labels
    nc1_sets                        tr(Sigma_W Sigma_B^+) / P over the P distinct sets in the place
                                    of classes

Those of a size are nan where one of its labels never stands alone. Source: Li et al., arXiv
2310.15903.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.metrics.collapse import nc1_pinv
from ufm_fast.metrics.statistics import ClassStatistics
from ufm_fast.targets import Targets, TargetSets

#: Of more sets of a size, so many evenly spaced ones stand for all where every pair of them has an
#: angle.
MOST_ANGLES = 4096


@torch.no_grad()
def tag_metrics(
    features: Tensor, targets: Targets, counts: Tensor, classes: int
) -> dict[str, float]:
    """features (R, d), row r with the labels of ``targets`` and standing for counts[r] equal
    samples.
    """
    assert targets.indptr is not None
    sets, index = TargetSets(targets.indptr.cpu(), targets.indices.cpu(), counts.cpu()).grouped()
    slot, number = index.to(features.device), sets.counts.numel()
    H, weight = features.double(), counts.to(features.device).double()
    means = H.new_zeros(number, H.shape[1]).index_add_(0, slot, H * weight[:, None])
    means /= sets.counts.to(H)[:, None]
    sizes = sets.indptr.diff()
    alone = torch.nonzero(sizes == 1)[:, 0]
    place = torch.full((classes,), -1)
    place[sets.indices[sets.indptr[alone]]] = alone
    found: dict[str, float] = {}
    for m in sorted(set(sizes.tolist())):
        if m > 1:
            chosen = torch.nonzero(sizes == m)[:, 0]
            labels = place[sets.indices[sets.indptr[chosen][:, None] + torch.arange(m)]]
            found |= {
                name.format(m): value for name, value in _of_size(means, chosen, labels).items()
            }
    if number > 1:
        found["nc1_sets"] = nc1_pinv(
            ClassStatistics(features, slot, number, counts.to(features.device))
        )
    return found


def _of_size(means: Tensor, sets: Tensor, labels: Tensor) -> dict[str, float]:
    """Of the sets in these rows of ``means``, whose labels alone are in the rows ``labels``, (sets,
    m), -1 for none.
    """
    names = ("tag_scale{}", "tag_scale{}_sd", "tag_cosine{}", "tag_angle_ratio{}")
    if bool((labels < 0).any()):
        return dict.fromkeys(names, math.nan)
    sums, own = torch.zeros_like(means[sets]), means[sets]
    for column in labels.T:
        sums += means[column]
    scale = (own * sums).sum(1) / sums.square().sum(1)
    a, b = own / own.norm(dim=1, keepdim=True), sums / sums.norm(dim=1, keepdim=True)
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))
    few = slice(None, None, -(-len(a) // MOST_ANGLES))
    every = sum(
        float(torch.acos((part @ b[few].T).clamp(-1.0, 1.0)).sum())
        for part in torch.split(a[few], 512)
    )
    typical = every / len(a[few]) ** 2
    values = (
        float(scale.mean()),
        float(scale.std(correction=0)),
        float((a * b).sum(1).mean()),
        float(angle.mean()) / typical if typical > 0 else math.nan,
    )
    return dict(zip(names, values, strict=True))
