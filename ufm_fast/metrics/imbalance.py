"""Geometry of classifiers of unequal classes: which classes have collapsed onto one row, and mean
cosines by groups.

Minority collapse: Fang et al., arXiv 2101.12699. The distance to the limit of no penalty is
`theory.seli_distance`; what a solution's metrics say of all that is named in ``IMBALANCE``
(`measure`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.errors import InputError

#: Rows nearer than this to one another, and shorter than this, relative to the longest row, are
#: one, and nothing.
SAME = 1e-6
#: Metrics of a solution whose classes have several counts, in words.
IMBALANCE = {
    "collapsed_groups": "groups of two classes and more that share one row of W",
    "collapsed_classes": "classes in these groups",
    "cosine_majority": "mean cosine of two classes of the largest count, classifier",
    "cosine_minority": "mean cosine of two classes of the smallest count, classifier",
    "cosine_between": "mean cosine of a class of the largest and one of the smallest count, "
    "classifier",
    "seli_classifier": "distance of WW' to its limit of no penalty, of the simplex-encoded labels",
    "seli_logits": "distance of the logits to that limit",
}


@torch.no_grad()
def collapsed_groups(weight: Tensor, tolerance: float = SAME) -> Tensor:
    """Which classes have one and the same row of W (K, d), to ``tolerance`` of the longest: int64
    (K,), groups numbered from 0 in the order of their first classes, whose row stands for the
    group. O(G K d) for G groups.
    """
    W = weight.double()
    reach = tolerance * float(W.norm(dim=1).max())
    group = torch.full((len(W),), -1, device=W.device)
    for number in range(len(W)):
        rest = torch.nonzero(group < 0).reshape(-1)
        if rest.numel() == 0:
            break
        group[rest[(W[rest] - W[rest[0]]).norm(dim=1) <= reach]] = number
    return group


@torch.no_grad()
def group_cosines(weight: Tensor, groups: Tensor, tolerance: float = SAME) -> Tensor:
    """Mean cosine of the rows of W (K, d) of different classes, for each pair of groups: float64
    (G, G).

    groups: int64 (K,), the group of each class, such as ``counts.unique(return_inverse=True)[1]``.
    Rows shorter than ``tolerance`` of the longest have no direction: pairs with one are left out,
    and a mean without any pair is nan.
    """
    if groups.shape != weight.shape[:1]:
        raise InputError(
            f"groups must have one entry for each of {len(weight)} rows of weight, got "
            f"{tuple(groups.shape)}"
        )
    W, number = weight.double(), int(groups.max()) + 1
    length = W.norm(dim=1)
    has = length > tolerance * length.max()
    unit = torch.where(has[:, None], W / length.clamp_min(1e-300)[:, None], 0.0)
    sums = W.new_zeros(number, W.shape[1]).index_add_(0, groups, unit)
    members = W.new_zeros(number).index_add_(0, groups, has.double())
    pairs = torch.outer(members, members) - torch.diag(members)
    return torch.where(pairs > 0, (sums @ sums.T - torch.diag(members)) / pairs, math.nan)


@torch.no_grad()
def imbalance_metrics(weight: Tensor, counts: Tensor) -> dict[str, float]:
    """Collapsed groups and mean cosines of W (K, d) with classes of ``counts`` (K,), of which at
    least two that differ.
    """
    group = collapsed_groups(weight)
    members = torch.bincount(group)
    several = members[members > 1]
    values, of_count = torch.unique(counts.to(weight.device), return_inverse=True)
    cosine = group_cosines(weight, of_count)
    first = int(values[0] == 0)  # classes without samples are no minority
    return {
        "collapsed_groups": float(several.numel()),
        "collapsed_classes": float(several.sum()),
        "cosine_majority": float(cosine[-1, -1]),
        "cosine_minority": float(cosine[first, first]),
        "cosine_between": float(cosine[first, -1]),
    }
