"""The tag-wise average of multi-label features: a pair's mean against the sum of its labels' means
(arXiv 2310.15903).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ufm_fast.errors import InputError
from ufm_fast.networks.train import BLOCK, Training


@dataclass(frozen=True)
class TagAverage:
    """cosine: mean over pairs S of cos(p_S, sum_{k in S} m_k). scale: C_2, the mean of <p_S, sum
    m_k>/|sum m_k|^2.

    m_k: mean of the features with the label k alone, about the mean of those; p_S: mean of the
    features with the labels S, about the mean of those. In the model both centres are zero, the
    cosine is 1 and C_2 = alpha_2/alpha_1.
    """

    cosine: float
    scale: float


@torch.no_grad()
def tag_average(features: Tensor, labels: Tensor) -> TagAverage:
    """features: (N, d); labels: (N, 2), the second one -1 where there is none.

    Errors: InputError where a label of a pair has no sample of its own, or no sample has two.
    """
    rows, single = features.double(), labels[:, 1] < 0
    pairs, slot = torch.unique(labels[~single].sort(1).values, dim=0, return_inverse=True)
    alone, place = torch.unique(labels[single, 0], return_inverse=True)
    if not len(pairs) or not bool(torch.isin(pairs, alone).all()):
        raise InputError("labels must hold pairs, and each label of a pair on its own too")
    of_labels, of_pairs = (
        _means(rows[single], place, len(alone)),
        _means(rows[~single], slot, len(pairs)),
    )
    sums = of_labels[torch.searchsorted(alone, pairs)].sum(1)
    inner = (of_pairs * sums).sum(1)
    cosine = inner / (of_pairs.norm(dim=1) * sums.norm(dim=1))
    return TagAverage(float(cosine.mean()), float((inner / sums.square().sum(1)).mean()))


def _means(rows: Tensor, slot: Tensor, number: int) -> Tensor:
    """Mean of each slot, about the mean of all slots."""
    total = rows.new_zeros(number, rows.shape[1]).index_add_(0, slot, rows)
    means = total / torch.bincount(slot, minlength=number)[:, None]
    return means - means.mean(0)


@torch.no_grad()
def network_tag_average(training: Training) -> TagAverage:
    """Of the training features of a network."""
    examples = training.data.train
    training.network.eval()
    blocks = torch.split(torch.arange(len(examples)), BLOCK)
    features = torch.cat([training.network.features(examples.images[block]) for block in blocks])
    return tag_average(features, examples.labels)
