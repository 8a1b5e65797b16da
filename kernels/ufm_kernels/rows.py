"""Loss and gradient factors of a softmax head from its row sums: everything between the N x K
passes.

For a row with target set S of M classes, offset o (mean target logit) and u = z - o:

    s = sum_(k not in S) exp(u_k),  D = sum_S expm1(u_k),  T = M + D
    l = log1p(s/T),  p = s/(T + s),  f = M g'(l) / (T + s)
    loss = M (g(l) + log T) + smoothing (z_y - mean_k z_k)      (one target: T = 1, loss g(l))
    dz_k = f E_k off the targets,   dz_k = (f/M) (M expm1(u_k) - D - s) on them

g is the identity for cross-entropy; a loss is the pair of functions value(l, p) = g and weight(l,
p) = g'. E is rounded before the products, and near collapse its rounding is systematic. So f is
rescaled by s over the sum of the rounded E, which makes every row of the gradient sum to zero
again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .row_sums import finish_rows, raise_offsets

LossFunction = Callable[[Tensor, Tensor], Tensor]


def cross_entropy_value(log_ratio: Tensor, probability: Tensor) -> Tensor:
    """g(l) = l."""
    return log_ratio


def cross_entropy_weight(log_ratio: Tensor, probability: Tensor) -> Tensor:
    """g'(l) = 1."""
    return torch.ones_like(log_ratio)


class HeadResult(NamedTuple):
    """Per row, fp32: unweighted loss; off-target mass s / T; margin min_S z - max_(not S) z; l and
    p of the formulas.
    """

    losses: Tensor
    off_target_mass: Tensor
    margin: Tensor
    log_ratio: Tensor
    probability: Tensor


@dataclass(frozen=True)
class Rows:
    """The vectors of a sweep, fp32, one entry a row (or one a target): given above, filled chunk by
    chunk below.

    The flag of a chunk is that of its first row. Without targets a row counts as one of logit zero.
    """

    # (rows, T) target logits; once settled, level with the largest other where rounding alone told
    # them apart.
    z: Tensor
    labels: Tensor  # (rows, T)
    scale: Tensor  # weight of the row in the objective
    mean: Tensor  # of the target logits
    offset: Tensor  # of the exponentials: the mean, or the maximum of a hostile row
    flag: Tensor  # int32
    totals: Tensor  # (3, rows) fp64, see `row_sums.raise_offsets`
    found: Tensor  # (8, rows), see `row_sums.finish_rows`
    own: Tensor  # (rows, T) scale times minus the gradient in each target logit

    @classmethod
    def of(cls, z: Tensor, labels: Tensor, scale: Tensor) -> "Rows":
        rows = len(z)
        mean = mean_over(z, labels)
        flag = torch.zeros(rows, dtype=torch.int32, device=z.device)
        totals = z.new_empty((3, rows), dtype=torch.float64)
        return cls(
            z,
            labels,
            scale,
            mean,
            mean.clone(),
            flag,
            totals,
            z.new_empty((8, rows)),
            torch.empty_like(z),
        )

    def part(self, rows: slice) -> "Rows":
        """Views of some rows."""
        first = (self.z, self.labels, self.scale, self.mean, self.offset, self.flag)
        return Rows(
            *(x[rows] for x in first), self.totals[:, rows], self.found[:, rows], self.own[rows]
        )

    @property
    def log_ratio(self) -> Tensor:
        return self.found[1]

    @property
    def probability(self) -> Tensor:
        return self.found[2]

    @property
    def mass(self) -> Tensor:
        """Sum of E."""
        return self.found[5]

    @property
    def kept(self) -> Tensor:
        """Sum of E as the products read it."""
        return self.found[6]

    @property
    def factor(self) -> Tensor:
        """Multiplies E."""
        return self.found[7]

    def settle(
        self,
        sweep: Callable[..., Any],
        weight: LossFunction,
        *,
        rounded: bool = True,
        band: float = 0.0,
    ) -> Any:
        """Run sweep(), and sweep(flag, into) again for rows that overflow; then fill `found` and
        `own`. What sweep returned.

        The second launch is always issued and ends at once on the device unless a row needs it: no
        synchronisation. `into` is what the first returned, statistics (3, tiles, rows) or a tuple
        that begins with them, to be written again.
        band: of `row_sums.raise_offsets`, see `head_parts.band_of`.
        """
        first = sweep()
        statistics = first[0] if isinstance(first, tuple) else first
        raise_offsets(
            statistics, self.z, self.labels, self.mean, self.offset, self.flag, self.totals, band
        )
        sweep(flag=self.flag, into=first)
        finish_rows(
            statistics,
            self.totals,
            self.flag,
            self.z,
            self.labels,
            self.mean,
            self.offset,
            self.scale,
            self.found,
            self.own,
            rounded=rounded,
        )
        if weight is not cross_entropy_weight:
            slope = weight(self.log_ratio, self.probability)
            self.factor.mul_(slope)
            self.own.mul_(slope[:, None])
        return first

    def result(self, value: LossFunction) -> HeadResult:
        losses = (
            self.found[0]
            if value is cross_entropy_value
            else value(self.log_ratio, self.probability)
        )
        return HeadResult(losses, self.found[3], self.found[4], self.log_ratio, self.probability)


def as_labels(targets: Tensor) -> Tensor:
    """(rows,) or (rows, T) integer targets as contiguous (rows, T) int32."""
    if targets.is_floating_point() or targets.dtype == torch.bool or targets.ndim not in (1, 2):
        raise ValueError(
            f"targets: shape {tuple(targets.shape)} of {targets.dtype}; must be integer (rows,) "
            f"or (rows, T)"
        )
    columns = targets[:, None] if targets.ndim == 1 else targets
    if columns.dtype not in (torch.int32, torch.int16, torch.int8, torch.uint8):
        # What is neither padding nor int32 must stay no class, not wrap into one.
        most, wide = torch.iinfo(torch.int32).max, columns.to(torch.int64)
        if not columns.dtype.is_signed:
            wide = torch.where(wide < 0, most, wide)
        columns = wide.clamp(-2, most)
    return columns.to(torch.int32).contiguous()


def mean_over(z: Tensor, labels: Tensor) -> Tensor:
    """Mean of each row's entries that have a label; 0 in a row without any, or with one of -inf."""
    if labels.shape[1] == 1:  # a row without a target has a logit of 0
        return z[:, 0].masked_fill(z[:, 0] == -torch.inf, 0.0)
    known = labels != -1
    mean = torch.where(known, z, 0.0).sum(1) / known.sum(1).clamp_min(1)
    return mean.masked_fill(mean == -torch.inf, 0.0)
