"""Label smoothing with class weights, around any backend: a cross-entropy and a term of rank one
beside its sweep.

For weights w (K,) and smoothing e, with t = e w / K and their sum |t| = e mean(w), the loss of a
row with target y is torch's

    l = ((1 - e) w_y + |t|) CE + |t| z_y - <t, z>

Both parts add into the same buffers, so that a gradient in half precision is rounded once, where
the parts have cancelled. With an infinite weight every row loses infinitely, as in torch, and no
gradient is a number.

Rows and classes may be spread over ranks (an input with a layout, a backend of the ranks): a rank
asks the others for the rows of W that are its rows' targets, and sends back their sums
(`exchange`). The class weights are those of all classes.
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
from ufm_fast.backends.exchange import home_of
from ufm_fast.backends.gram import row_blocks
from ufm_fast.backends.sums import weighted_sum


class ClassWeighted:
    """A backend for the cross-entropy, whose rows lose l instead. ``weight`` (K,) float64,
    ``smoothing`` in [0, 1].
    """

    def __init__(self, backend: Backend, weight: Tensor, smoothing: float) -> None:
        self.backend, self.weight, self.smoothing = backend, weight, smoothing
        self.name = f"{backend.name}, class weights"

    @property
    def _share(self) -> Tensor:
        """t, of all classes."""
        return self.smoothing / self.weight.numel() * self.weight

    def _here(self, x: HeadInput) -> Tensor:
        """t of the classes here."""
        return self._share if x.layout is None else self._share[x.layout.class_part]

    def _factor(self, x: HeadInput) -> Tensor:
        """What multiplies the cross-entropy of each row."""
        return (1.0 - self.smoothing) * self.weight[x.targets.indices] + self._share.sum()

    def _plain(self, x: HeadInput) -> HeadInput:
        o = x.row_weight.double()
        return replace(x, row_weight=torch.where(o == 0, 0.0, o * self._factor(x)))

    def head(self, x: HeadInput, out: Gradients, *, statistics: bool = False) -> HeadResult:
        result = self.backend.head(self._plain(x), out, statistics=statistics)
        home = home_of(x.targets, x.layout)
        self._add(out, x.features, x.weight, x)
        if out.bias is not None:
            o, share = x.row_weight.double(), self._here(x)
            pull = home.totals(share.numel(), o) * self._share.sum()
            out.bias.add_(pull - share * home.total(o.sum()))
        tilt = home.total(weighed(x.row_weight, self._tilt(x)))
        return HeadResult(self._or_infinite(result.value + tilt, x), result.statistics)

    def _or_infinite(self, value: Tensor, x: HeadInput) -> Tensor:
        """The data term; of an infinite weight infinity times the weight of all rows, where finite
        parts are NaN.
        """
        level = self._share.sum()
        total = home_of(x.targets, x.layout).total(x.row_weight.double().sum())
        return torch.where(level.isinf(), level * total, value)

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
        home, o, share = home_of(x.targets, x.layout), x.row_weight.double(), self._here(x)
        level = self._share.sum()
        if out.features is not None and weight is not None:
            middle, of_targets = home.total(weighted_sum(weight, share)), home.rows(weight)
            for part in row_blocks(o.numel()):
                pull = level * of_targets(part).double() - middle
                out.features[part].add_(o[part, None] * pull)
        if out.weight is not None and features is not None:
            for part in row_blocks(o.numel()):
                home.add(out.weight, part, features[part], level * o[part])
            home.settle(out.weight)
            out.weight.sub_(torch.outer(share, home.total(weighted_sum(features, o))))

    def _tilt(self, x: HeadInput) -> Tensor:
        """|t| z_y - <t, z> of each row, float64: the target's row of W less the weighted mean of
        all.
        """
        home, share, tilt = home_of(x.targets, x.layout), self._here(x), []
        level, middle = self._share.sum(), home.total(weighted_sum(x.weight, share))
        of_targets = home.rows(x.weight)
        for part in row_blocks(x.row_weight.numel()):
            pull = level * of_targets(part).double() - middle
            tilt.append((x.features[part].double() * pull).sum(1))
        total = torch.cat([share[:0], *tilt])
        if x.bias is None:
            return total
        b = x.bias.double()
        own = home.rows(b)(slice(None))
        # Where the target is impossible (-inf), the loss is infinite already, and must not become
        # nan here.
        usual = level * own - home.total(share @ b)
        possible = b.masked_fill(b == -torch.inf, 0.0)
        spared = level * own.masked_fill(own == -torch.inf, 0.0) - home.total(share @ possible)
        return total + torch.where(own == -torch.inf, spared, usual)


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
