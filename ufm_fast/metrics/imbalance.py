"""Geometry of classifiers of unequal classes: which classes have collapsed onto one row, and mean cosines by groups.

Minority collapse: Fang et al., arXiv 2101.12699. The distance to the limit of no penalty is `theory.seli_distance`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ufm_fast.errors import InputError

#: Rows nearer than this to one another, and shorter than this, relative to the longest row, are one, and nothing.
SAME = 1e-6


@torch.no_grad()
def collapsed_groups(weight: Tensor, tolerance: float = SAME) -> Tensor:
    """Which classes have one and the same row of W (K, d), to ``tolerance`` of the longest: int64 (K,), groups numbered from
    0 in the order of their first classes, whose row stands for the group. O(G K d) for G groups.
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
    """Mean cosine of the rows of W (K, d) of different classes, for each pair of groups: float64 (G, G).

    groups: int64 (K,), the group of each class, such as ``counts.unique(return_inverse=True)[1]``. Rows shorter than
    ``tolerance`` of the longest have no direction: pairs with one are left out, and a mean without any pair is nan.
    """
    if groups.shape != weight.shape[:1]:
        raise InputError(f"groups must have one entry for each of {len(weight)} rows of weight, got {tuple(groups.shape)}")
    W, number = weight.double(), int(groups.max()) + 1
    length = W.norm(dim=1)
    has = length > tolerance * length.max()
    unit = torch.where(has[:, None], W / length.clamp_min(1e-300)[:, None], 0.0)
    sums = W.new_zeros(number, W.shape[1]).index_add_(0, groups, unit)
    members = W.new_zeros(number).index_add_(0, groups, has.double())
    pairs = torch.outer(members, members) - torch.diag(members)
    return torch.where(pairs > 0, (sums @ sums.T - torch.diag(members)) / pairs, math.nan)
