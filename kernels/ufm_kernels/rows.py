"""Loss and gradient factors of a softmax head from its row sums: everything between the N x K passes.

For a row with target set S of M classes, offset o (mean target logit) and u = z - o:

    s = sum_(k not in S) exp(u_k),  D = sum_S expm1(u_k),  T = M + D,   l = log1p(s/T),  p = s/(T + s)
    loss = M (g(l) + log T) + smoothing (z_y - mean_k z_k)      (one target: T = 1, so the loss is g(l))
    dz_k = f E_k off the targets,   dz_k = (f/M) (M expm1(u_k) - D - s) on them,   f = M g'(l) / (T + s)

g is the identity for cross-entropy; a loss is the pair of functions value(l, p) = g and weight(l, p) = g'.
E is rounded before the products, and near collapse its rounding is systematic. So f is rescaled by s over the sum of
the rounded E, which makes every row of the gradient sum to zero again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HOSTILE = 2.0**40  # a wrong class leads by about 28 nats: from here on a row uses its maximum as the offset

LossFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_value(log_ratio: Tensor, probability: Tensor) -> Tensor:
    """g(l) = l."""
    return log_ratio


def cross_entropy_weight(log_ratio: Tensor, probability: Tensor) -> Tensor:
    """g'(l) = 1."""
    return torch.ones_like(log_ratio)


def focal(gamma: float) -> tuple[LossFunction, LossFunction]:
    """(value, weight) of the focal loss p^gamma l, p the probability off the target; finite for every gamma >= 0."""

    def value(l: Tensor, p: Tensor) -> Tensor:
        return p**gamma * l

    def weight(l: Tensor, p: Tensor) -> Tensor:
        ratio = torch.where(p > 0, l * (1 - p) / p, 1.0)
        return p**gamma * (1 + gamma * ratio)

    return value, weight


def focal_curvature(gamma: float) -> LossFunction:
    """g'' of the focal loss, for Hessian-vector products."""

    def curvature(l: Tensor, p: Tensor) -> Tensor:
        ratio = torch.where(p > 0, l * (1 - p) / p, 1.0)
        return gamma * p ** (gamma - 1) * (1 - p) * (2 + (gamma - 1) * ratio - l)

    return curvature


class HeadResult(NamedTuple):
    """Per row, fp32: unweighted loss; off-target mass s / T; margin min_S z - max_(not S) z."""

    losses: Tensor
    off_target_mass: Tensor
    margin: Tensor


@dataclass(frozen=True)
class Rows:
    """What the epilogues of a chunk need, one entry a row (`own`: one entry a target)."""

    loss: Tensor
    ratio: Tensor  # s / T
    margin: Tensor
    factor: Tensor  # multiplies the rounded E
    own: Tensor  # minus the gradient in each target logit


def as_labels(targets: Tensor) -> Tensor:
    """(rows,) or (rows, T) integer targets as contiguous (rows, T) int32."""
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim not in (1, 2):
        raise ValueError(f"targets: shape {tuple(targets.shape)} of {targets.dtype}; must be integer (rows,) or (rows, T)")
    columns = targets[:, None] if targets.ndim == 1 else targets
    if columns.dtype not in (torch.int32, torch.int16, torch.int8, torch.uint8):
        # What is neither padding nor int32 must stay no class, not wrap into one.
        least, most = -1 if columns.dtype.is_signed else 0, torch.iinfo(torch.int32).max
        columns = columns.to(torch.int64)
        columns = torch.where((columns < least) | (columns > most), most, columns)
    return columns.to(torch.int32).contiguous()


def mean_over(z: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """(M, mean of the known entries) of every row; a row without targets counts as one of logit zero."""
    count = known.sum(1).clamp_min(1)
    return count.float(), torch.where(known, z, 0.0).sum(1) / count


def finish_rows(z: Tensor, known: Tensor, offset: Tensor, sums: Tensor, value: LossFunction, weight: LossFunction) -> Rows:
    """Loss, factor and target coefficients from target logits z (rows, T), offset and statistics (3, rows)."""
    mass, kept, peak = sums
    count, mean = mean_over(z, known)
    shift = offset - mean
    excess = torch.where(known, torch.expm1(z - mean[:, None]), 0.0)
    raised = shift != 0  # rows that the fallback moved to their maximum
    unit = torch.where(known, torch.exp(z - offset[:, None]), 0.0)
    total = torch.where(raised, unit.sum(1), count + excess.sum(1))
    log_total = torch.where(raised, torch.log(total) + shift, torch.log(total))
    # log(T + s) directly where s / T overflows or T underflows
    log_ratio = torch.where(raised, torch.log(total + mass) + shift - log_total, torch.log1p(mass / total))
    lost = raised & (total == 0)
    log_ratio = torch.where(lost, torch.log(mass) + shift - log_sum(z, known, mean), log_ratio)
    log_total = torch.where(lost, log_sum(z, known, mean), log_total)
    probability = mass / (total + mass)
    scaled = torch.where(
        raised[:, None], count[:, None] * unit - total[:, None], count[:, None] * excess - (total - count)[:, None]
    )
    slope = weight(log_ratio, probability)
    common = slope / (total + mass)
    return Rows(
        loss=count * (value(log_ratio, probability) + log_total),
        ratio=mass / total,
        margin=torch.where(known, z, float("inf")).amin(1) - (peak + offset),
        factor=common * count * torch.where(kept > 0, mass / kept, 1.0),
        own=torch.where(known, common[:, None] * (mass[:, None] - scaled), 0.0),
    )


def log_sum(z: Tensor, known: Tensor, mean: Tensor) -> Tensor:
    """log sum_S exp(z - mean)."""
    return torch.logsumexp(torch.where(known, z - mean[:, None], float("-inf")), 1)


def twice(
    attempt: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]], z: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(offset, statistics, extra) of attempt(offset, flag), from the target logits, then from the maxima if need be.

    The second launch is always issued and ends at once on the device unless a row needs it: no synchronisation.
    """
    known = labels >= 0
    _, mean = mean_over(z, known)
    statistics, extra = attempt(mean, None)
    sums = collected(statistics)
    total = torch.where(known, torch.exp(z - mean[:, None]), 0.0).sum(1)
    hostile = ~(sums[0] + total <= HOSTILE)
    top = torch.maximum(mean + sums[2], torch.where(known, z, float("-inf")).amax(1))
    offset = torch.where(hostile, top, mean)
    flag = hostile.any()
    statistics, again = attempt(offset, flag.to(torch.int32))
    sums = torch.where(flag, collected(statistics), sums)
    return offset, sums, None if extra is None else torch.where(flag, again, extra)


def collected(statistics: Tensor) -> Tensor:
    """Per-tile statistics (3, tiles, rows) reduced over the tiles: two sums and a maximum."""
    return torch.cat((statistics[:2].sum(1), statistics[2:].amax(1)))
