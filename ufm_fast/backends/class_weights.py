"""Label smoothing with class weights, around any backend: a cross-entropy and a term of rank one
beside its sweep.

For weights w (K,) and smoothing e, with t = e w / K and their sum |t| = e mean(w), the loss of a
row with target y is torch's

    l = ((1 - e) w_y + |t|) CE + |t| z_y - <t, z>

Both parts add into the same buffers, so that a gradient in half precision is rounded once, where
the parts have cancelled. With an infinite weight every row loses infinitely, as in torch, and no
gradient is a number.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ufm_fast.backends.base import (
    Backend,
    Gradients,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    weighed,
)
from ufm_fast.backends.gram import row_blocks
from ufm_fast.backends.sums import add_class_sums, class_totals, weighted_sum


class ClassWeighted:
    """A backend for the cross-entropy, whose rows lose l instead. ``weight`` (K,) float64,
    ``smoothing`` in [0, 1].
    """

    def __init__(self, backend: Backend, weight: Tensor, smoothing: float) -> None:
        self.backend, self.weight, self.smoothing = backend, weight, smoothing
        self.name = f"{backend.name}, class weights"

    @property
    def _share(self) -> Tensor:
        return self.smoothing / self.weight.numel() * self.weight

    def _factor(self, x: HeadInput) -> Tensor:
        """What multiplies the cross-entropy of each row."""
        return (1.0 - self.smoothing) * self.weight[x.targets.indices] + self._share.sum()

    def _plain(self, x: HeadInput) -> HeadInput:
        o = x.row_weight.double()
        return replace(x, row_weight=torch.where(o == 0, 0.0, o * self._factor(x)))

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        result = self.backend.head(self._plain(x), out, statistics=statistics)
        self._add(out, x.features, x.weight, x)
        if out.bias is not None:
            o = x.row_weight.double()
            pull = class_totals(self.weight.numel(), x.targets.indices, o) * self._share.sum()
            out.bias.add_(pull - self._share * o.sum())
        return HeadResult(
            self._or_infinite(result.value + weighed(x.row_weight, self._tilt(x)), x),
            result.statistics,
        )

    def _or_infinite(self, value: Tensor, x: HeadInput) -> Tensor:
        """The data term; of an infinite weight infinity times the weight of all rows, where finite
        parts are NaN.
        """
        level = self._share.sum()
        return torch.where(level.isinf(), level * x.row_weight.double().sum(), value)

    def head_hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        self.backend.head_hvp(self._plain(x), v, out)
        self._add(out.cleared() if out.fresh else out, v.features, v.weight, x)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return _WeightedGradient(self, x)

    def losses(self, x: HeadInput) -> Tensor:
        level = self._share.sum()
        return torch.where(
            level.isinf(), level, self._factor(x) * self.backend.losses(x) + self._tilt(x)
        )

    def plan(self, shape: HeadShape) -> HeadPlan:
        return self.backend.plan(shape)

    def _add(
        self, out: Gradients, features: Tensor | None, weight: Tensor | None, x: HeadInput
    ) -> None:
        """The logit gradient G of the term of rank one: adds G weight for the rows, and G' features
        for the classes.
        """
        y, o, share = x.targets.indices, x.row_weight.double(), self._share
        level = share.sum()
        if out.features is not None and weight is not None:
            middle = weighted_sum(weight, share)
            for part in row_blocks(len(y)):
                pull = level * weight.index_select(0, y[part]).double() - middle
                out.features[part].add_(o[part, None] * pull)
        if out.weight is not None and features is not None:
            for part in row_blocks(len(y)):
                add_class_sums(out.weight, y[part], features[part], level * o[part])
            out.weight.sub_(torch.outer(share, weighted_sum(features, o)))

    def _tilt(self, x: HeadInput) -> Tensor:
        """|t| z_y - <t, z> of each row, float64: the target's row of W less the weighted mean of
        all.
        """
        y, share = x.targets.indices, self._share
        level, middle, tilt = share.sum(), weighted_sum(x.weight, share), []
        for part in row_blocks(len(y)):
            pull = level * x.weight.index_select(0, y[part]).double() - middle
            tilt.append((x.features[part].double() * pull).sum(1))
        total = torch.cat([share[:0], *tilt])
        if x.bias is None:
            return total
        b = x.bias.double()
        # Where the target is impossible (-inf), the loss is infinite already, and must not become
        # nan here.
        usual, spared = (level * c[y] - share @ c for c in (b, b.masked_fill(b == -torch.inf, 0.0)))
        return total + torch.where(b[y] == -torch.inf, spared, usual)


class _WeightedGradient:
    """The logit gradient of the cross-entropy and of the term of rank one."""

    def __init__(self, backend: ClassWeighted, x: HeadInput) -> None:
        self.backend, self.x, self.plain = (
            backend,
            x,
            backend.backend.logit_gradient(backend._plain(x)),
        )

    def times(self, right: Tensor) -> Tensor:
        product = self.plain.times(right)
        self.backend._add(Gradients(product, None, None), None, right, self.x)
        return product

    def transposed_times(self, left: Tensor) -> Tensor:
        product = self.plain.transposed_times(left)
        self.backend._add(Gradients(None, product, None), left, None, self.x)
        return product
