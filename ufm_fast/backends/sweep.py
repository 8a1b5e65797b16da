"""The sweep of a softmax head: a chunk of rows at a time, its exponentials and what they tell of
each row.

For row i let o be an offset near the off-target logits, E_k = exp(z_k - o) off target and 0 on
target, s' = sum E_k. Then

    u = log s' + o - z_y = log(off-target mass),   l = softplus(u) = -log p_y,
    p = sigmoid(u) = 1 - p_y,

are vectors of length R, taken in float64 whatever the dtype of the products. With several targets
z_y is their mean, and log T = log sum exp(z_k - z_y) over them is taken off u.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ufm_fast.backends.base import HeadInput, compute_dtype, softmax_loss
from ufm_fast.backends.exponentials import alike, exact_mean, exponentials, target_logits


def _same(values: Tensor) -> Tensor:
    return values


@dataclass
class Chunk:
    """One chunk of rows after its sweep; vectors are float64 of the chunk's length C."""

    start: int
    stop: int
    features: Tensor  # C x d, in the compute dtype
    E: Tensor  # K x C exponentials, zero on targets; overwritten by later steps
    mass: Tensor  # s', the sum of E
    entry_row: Tensor  # row within the chunk of each target entry
    entry_class: Tensor
    entry_logit: Tensor  # z at the target entries
    entry_share: Tensor  # softmax among the row's targets (1 for a single label)
    M: Tensor  # targets a row
    margin: Tensor | None  # lowest target logit less the largest other, with statistics
    l: Tensor
    p: Tensor
    log_mass: Tensor  # u + log T: log of the off-target mass relative to the mean target logit
    excess: Tensor  # D / T with D = sum expm1(z_k - mean target logit), T = M + D
    value: Tensor  # loss of each row, without row weight
    mean_target: Tensor
    row_weight: Tensor
    classes: int  # K
    single: bool  # whether each row has one target: then entries are rows, in order
    # Of E's classes to sums over all K, which may be on other ranks (`sharded`).
    total: Callable[[Tensor], Tensor] = _same

    def row_sum(self, values: Tensor) -> Tensor:
        """Sum of the entries' values in each row."""
        return (
            values
            if self.single
            else self.total(_segment_sum(values, self.entry_row, self.M.shape[0]))
        )

    def of_entries(self, values: Tensor) -> Tensor:
        """The rows' values at their entries."""
        return values if self.single else values[self.entry_row]


class Entries(NamedTuple):
    """The targets of a chunk of C rows: row and class of each entry. ``single``: one a row, in
    order.
    """

    rows: Tensor
    classes: Tensor
    number: int
    single: bool

    def of_rows(self, values: Tensor) -> Tensor:
        return values if self.single else values[self.rows]

    def sum(self, values: Tensor) -> Tensor:
        return values if self.single else _segment_sum(values, self.rows, self.number)

    def least(self, values: Tensor) -> Tensor:
        return values if self.single else self._reduced(values, "amin", math.inf)

    def largest(self, values: Tensor) -> Tensor:
        return values if self.single else self._reduced(values, "amax", -math.inf)

    def _reduced(self, values: Tensor, how: str, start: float) -> Tensor:
        return values.new_full((self.number,), start).scatter_reduce(0, self.rows, values, how)


class Told(NamedTuple):
    """What the sweep of a chunk tells, float64: of its target entries the logit, the logit as the
    product rounded it and, with smoothing, the logit less the mean of all; of its rows the number
    of targets M, the sum of exponentials, the offset those are relative to and, with statistics,
    the largest logit off target.
    """

    z: Tensor
    rounded: Tensor
    tilt: Tensor | None
    M: Tensor
    mass: Tensor
    offset: Tensor
    top: Tensor | None


class Sweep:
    """The chunks of a head, whose exponentials take turns in ``buffer`` (K x C): each is valid
    until the next is asked for.

    ``statistics``: rows' margins too.
    """

    def __init__(self, x: HeadInput, buffer: Tensor, *, statistics: bool = False) -> None:
        self.x, self.loss, self.buffer, self.statistics = x, softmax_loss(x), buffer, statistics
        self.W = x.weight.to(compute_dtype(x.weight.dtype))
        self.mean = self.W.mean(0)
        self.bias = None if x.bias is None else x.bias.double()

    def __iter__(self) -> Iterator[Chunk]:
        exact = exact_mean(self.W) if self.loss.smoothing else None
        for start in range(0, self.x.features.shape[0], self.buffer.shape[1]):
            yield self._chunk(start, exact)

    def _chunk(self, start: int, exact: Tensor | None) -> Chunk:
        h = self.x.features[start : start + self.buffer.shape[1]].to(self.W.dtype)
        stop = start + h.shape[0]
        entries = Entries(*self.x.targets.slice(start, stop), h.shape[0], self.x.targets.single)
        E = self.buffer[:, : h.shape[0]]
        return finished(
            self.x,
            slice(start, stop),
            h,
            E,
            entries,
            self._told(h, E, entries, exact, start),
            self.W.shape[0],
        )

    def _told(
        self, h: Tensor, E: Tensor, entries: Entries, exact: Tensor | None, start: int
    ) -> Told:
        """Fills E."""
        z, M, offset = self._logits(h, entries)
        of_logits = None if self.bias is None else self.bias.to(self.W.dtype)
        mass, offset, top, rounded = exponentials(
            h, self.W, of_logits, offset, entries.rows, entries.classes, E, top=self.statistics
        )
        tilt = None if exact is None else self._tilt(h, entries, exact, start)
        return Told(z, rounded, tilt, M, mass, offset, top)

    def _logits(self, h: Tensor, entries: Entries) -> tuple[Tensor, Tensor, Tensor]:
        """Exact target logits (entries), targets a row, and the mean off-target logit (rows)."""
        K = self.W.shape[0]
        z = target_logits(h, self.W, entries.rows, entries.classes, entries.single)
        mean_logit = torch.mv(h, self.mean).double()
        M = entries.sum(torch.ones_like(z))
        if self.bias is not None:
            z = z + self.bias[entries.classes]
            mean_logit = mean_logit + self.bias.mean()
        return z, M, (K * mean_logit - entries.sum(z)) / (K - 1 if entries.single else K - M)

    def _tilt(self, h: Tensor, entries: Entries, exact: Tensor, start: int) -> Tensor:
        """The target's logit less the mean of all, margin included; ``exact``: the mean row of
        W.
        """
        tilt = target_logits(h, self.W, entries.rows, entries.classes, True, exact)
        if self.bias is not None:
            tilt = tilt + (self.bias[entries.classes] - exact_mean(self.bias))
        if self.x.margin is not None:
            tilt = tilt - self.x.margin[start : start + h.shape[0]] * (1.0 - 1.0 / self.W.shape[0])
        return tilt


def finished(
    x: HeadInput, part: slice, h: Tensor, E: Tensor, entries: Entries, told: Told, classes: int
) -> Chunk:
    """The chunk of these rows: losses and shares, from what its sweep tells."""
    loss, (z, rounded, tilt, M, mass, offset, top) = softmax_loss(x), told
    margin = None if top is None else entries.least(alike(z, rounded, entries.of_rows(top))) - top
    log_mass = mass.log()
    z = alike(z, rounded, entries.of_rows(log_mass + offset))

    total = entries.sum(z)
    mean = _mean_target(z, total, M, entries)
    share, log_total, excess = _target_share(z, mean, M, entries)
    log_mass = log_mass + (offset - mean)
    if x.bias is not None:  # a parameter that has diverged must not pass for a perfect fit
        log_mass = torch.where(mean == math.inf, math.nan, log_mass)
    u = log_mass - log_total
    if x.margin is not None:
        u = u + x.margin[part]
    l, p = torch.nn.functional.softplus(u, threshold=40.0), torch.sigmoid(u)
    value = (
        torch.where(total == -math.inf, math.inf, M * (log_total + l))
        if loss.multi_label
        else loss.value(l, p)
    )
    if tilt is not None:
        # Where the target is impossible, the loss is infinite already, and so may its mean logit
        # be.
        value = value + loss.smoothing * torch.where(z == -torch.inf, 0.0, tilt)
    return Chunk(
        part.start,
        part.stop,
        h,
        E,
        mass,
        entries.rows,
        entries.classes,
        z,
        share,
        M,
        margin,
        l,
        p,
        log_mass,
        excess,
        value,
        mean,
        x.row_weight[part].double(),
        classes,
        entries.rows.numel() == M.numel(),
    )


def _mean_target(z: Tensor, total: Tensor, M: Tensor, entries: Entries) -> Tensor:
    """Mean target logit of each row; where a target is impossible (-inf) that of the best one, and
    0 without any.
    """
    if entries.single:
        return z
    mean = total / M
    best = entries.largest(z)
    return torch.where(mean == -math.inf, best.masked_fill(best == -math.inf, 0.0), mean)


def _target_share(
    z: Tensor, mean: Tensor, M: Tensor, entries: Entries
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax among the targets (entries), log T and D / T (rows), with T = sum exp(z - mean) = M +
    D over the targets.
    """
    if entries.single:
        zero = torch.zeros_like(mean)
        return M, zero, zero
    rows = entries.rows
    u = z - mean[rows]
    D = entries.sum(torch.expm1(u))
    top = entries.largest(u)
    spread = top + entries.sum(torch.exp(u - top[rows])).log()
    log_total = torch.where(D < 1e3, M.log() + torch.log1p(D / M), spread)
    share = torch.where(u == -math.inf, 0.0, torch.exp(u - log_total[rows]))
    return share, log_total, torch.where((D < 1e3) & (M + D > 0), D / (M + D), torch.ones_like(D))


def _segment_sum(values: Tensor, rows: Tensor, number: int) -> Tensor:
    return torch.zeros(number, dtype=values.dtype, device=values.device).index_add_(0, rows, values)
