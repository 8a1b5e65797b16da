"""Where minimisers change kind: collapse to zero, collapse of minority classes, simplex to
orthogonal frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ufm_fast.theory.arguments import (
    check_counts,
    check_integer,
    check_positive,
    check_smoothing,
    nuclear_coefficient,
)
from ufm_fast.theory.convex import bisect
from ufm_fast.theory.softmax import class_price
from ufm_fast.theory.two_groups import weighted_two_groups


def collapse_penalty(count: int, samples: int, smoothing: float = 0.0) -> float:
    """The mu = sqrt(lambda_W lambda_H) from which on a class of `count` samples loses its own
    logits:

    mu >= (1 - smoothing) sqrt(n_k)/N, with N = `samples`. Cross-entropy and squared error alike,
    any K and bias. For balanced classes this is c >= 1 - smoothing: the whole solution is zero. Our
    derivation.
    """
    root = math.sqrt(check_integer("count", count, 0))
    return (1 - check_smoothing(smoothing)) * root / check_integer("samples", samples, 1)


def collapsed_classes(
    counts: Sequence[int] | Tensor, lambda_w: float, lambda_h: float, smoothing: float = 0.0
) -> Tensor:
    """Boolean (K,): which classes are beyond their `collapse_penalty`."""
    n = check_counts(counts)
    limit = (1 - check_smoothing(smoothing)) * torch.sqrt(n) / n.sum()
    return nuclear_coefficient(lambda_w, lambda_h) >= limit


def collapse_level(classes: int, per_class: int, lambda_w: float, lambda_h: float) -> float:
    """c = K sqrt(n lambda_W lambda_H) of balanced classes: W = H = 0 is the minimiser from c = 1 -
    smoothing on.
    """
    return classes * class_price(classes, per_class, lambda_w, lambda_h)


def simplex_bias_penalty(classes: int, per_class: int, lambda_w: float, lambda_h: float) -> float:
    """The lambda_b up to which squared error's balanced means are a centred simplex: c/(1 - c),
    infinite for c >= 1.

    Beyond it the features also carry a mean, and lambda_b -> infinity gives the orthogonal frame of
    no bias.
    Source: arXiv 2203.01238.
    """
    c = collapse_level(classes, per_class, lambda_w, lambda_h)
    return c / (1 - c) if c < 1 else math.inf


def majority_count_at_collapse(
    classes: tuple[int, int], minority_count: int, lambda_w: float, lambda_h: float
) -> float:
    """The n_A from which on the K_B classes of n_B = `minority_count` samples collapse:
    (sqrt(n_B)/mu - K_B n_B)/K_A.

    Setting: arXiv 2309.09725; the formula is our derivation.
    """
    root = math.sqrt(check_integer("minority_count", minority_count, 1))
    first, second = (check_integer(f"classes[{g}]", classes[g], 1) for g in (0, 1))
    return (root / nuclear_coefficient(lambda_w, lambda_h) - second * minority_count) / first


def layer_peeled_collapse_ratio(
    classes: tuple[int, int], energy_w: float, energy_h: float
) -> float:
    """The imbalance ratio R from which on the layer-peeled model's minority classes (group B)
    collapse.

    There the constraint's multiplier is exactly 1/R, so one bisection on R meets the constraint and
    the threshold.
    Setting: arXiv 2101.12699; the criterion is our derivation.
    """
    for g in (0, 1):
        check_integer(f"classes[{g}]", classes[g], 1)
    energy = math.sqrt(check_positive("energy_w", energy_w)) * math.sqrt(
        check_positive("energy_h", energy_h)
    )

    def unspent(log_ratio: float) -> float:
        price = math.exp(-log_ratio)
        return (
            sum(classes) * energy
            - weighted_two_groups(classes, (1.0, price), (1.0, 1.0), price).nuclear_norm
        )

    high = 1.0
    while unspent(high) > 0:
        high *= 2
    return math.exp(bisect(unspent, 0.0, high))
