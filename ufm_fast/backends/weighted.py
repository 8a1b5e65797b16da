"""The pick-all loss as a head: sets by the softmax head that it is given, weighted ones by that
head's cross-entropy of one label a row and a sparse term linear in the logits (`weighted_targets`),
O(entries d) beside its sweep.

With C the R x K matrix of the c and D = diag(o):  value + sum_r o_r <c_r, z_r>,  dH + D C W,
dW + C' D H,  db + C' o, and the Hessian's product the same of a direction. Sums run in float64 by
blocks of entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ufm_fast.backends.base import (
    Gradients,
    Head,
    HeadInput,
    HeadPlan,
    HeadResult,
    HeadShape,
    LogitGradient,
    weighed,
)
from ufm_fast.backends.sums import add_class_sums
from ufm_fast.losses import CrossEntropy
from ufm_fast.targets import Targets
from ufm_fast.weighted_targets import WeightedTargets

_BLOCK = 1 << 21  # numbers of a block of gathered rows


class PickAllHead:
    """``inner``: the head of every softmax loss."""

    def __init__(self, inner: Head) -> None:
        self.inner = inner

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        if not isinstance(x.targets, WeightedTargets):
            return self.inner.value_and_grad(x, out, statistics=statistics)
        plain, tilt = one_label(x), Tilt.of(x)
        result = self.inner.value_and_grad(plain, out, statistics=statistics)
        tilt.add(Gradients(out.features, out.weight, out.bias), x.features, x.weight)
        return HeadResult(
            result.value + weighed(x.row_weight, tilt.values(x.features, x.weight, x.bias)),
            result.statistics,
        )

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        if not isinstance(x.targets, WeightedTargets):
            return self.inner.hvp(x, v, out)
        self.inner.hvp(one_label(x), one_label(v), out)
        Tilt.of(x).add(Gradients(out.features, out.weight, None), v.features, v.weight)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        if not isinstance(x.targets, WeightedTargets):
            return self.inner.logit_gradient(x)
        return _Gradient(self.inner.logit_gradient(one_label(x)), Tilt.of(x))

    def losses(self, x: HeadInput) -> Tensor:
        if not isinstance(x.targets, WeightedTargets):
            return self.inner.losses(x)
        return x.targets.sums() * self.inner.losses(one_label(x)) + Tilt.of(x).values(
            x.features, x.weight, x.bias
        )

    def plan(self, shape: HeadShape) -> HeadPlan:
        return self.inner.plan(shape)


def one_label(x: HeadInput) -> HeadInput:
    """Rows with the label of their largest weight, each weighing Q times as much; both are
    remembered on the targets.
    """
    assert isinstance(x.targets, WeightedTargets)
    kept, key = x.targets.remembered, ("one label",)
    found = cast("tuple[Targets, Tensor, Tensor] | None", kept.get(key))
    if found is None or found[1] is not x.row_weight:
        labels = Targets(x.targets.leading()[0]) if found is None else found[0]
        found = labels, x.row_weight, x.row_weight.double() * x.targets.sums()
        kept[key] = found
    return replace(x, loss=CrossEntropy(), targets=found[0], row_weight=found[2])


@dataclass(frozen=True)
class Tilt:
    """D C of some rows and classes, by its entries: ``rows`` and ``classes`` where they are,
    ``pull`` c, all (entries,), and ``row_weight`` o, (R,), float64.
    """

    rows: Tensor
    classes: Tensor
    pull: Tensor
    row_weight: Tensor

    @classmethod
    def of(cls, x: HeadInput) -> Tilt:
        """That of a head."""
        assert isinstance(x.targets, WeightedTargets)
        return cls(
            x.targets.entry_rows(),
            x.targets.indices,
            x.targets.leading()[1],
            x.row_weight.double(),
        )

    @cached_property
    def entries(self) -> Tensor:
        """o_r c_rk, (entries,)."""
        return self.pull * self.row_weight[self.rows]

    def _blocks(self, columns: int) -> Iterator[slice]:
        step = max(1, _BLOCK // columns)
        return (slice(start, start + step) for start in range(0, self.pull.numel(), step))

    def times(self, right: Tensor) -> Tensor:
        """D C right, (R, c) in float64."""
        total = torch.zeros(
            self.row_weight.numel(), right.shape[1], dtype=torch.float64, device=right.device
        )
        for part in self._blocks(right.shape[1]):
            total.index_add_(
                0, self.rows[part], right[self.classes[part]].double() * self.entries[part, None]
            )
        return total

    def add_transposed(self, out: Tensor, left: Tensor) -> None:
        """out + C' D left, (K, c)."""
        for part in self._blocks(left.shape[1]):
            add_class_sums(out, self.classes[part], left[self.rows[part]], self.entries[part])

    def add_class_sums(self, out: Tensor) -> None:
        """out + C' o, (K,)."""
        out.index_add_(0, self.classes, self.entries.to(out.dtype))

    def add(self, out: Gradients, features: Tensor, weight: Tensor) -> None:
        if out.features is not None:
            out.features.add_(self.times(weight))
        if out.weight is not None:
            self.add_transposed(out.weight, features)
        if out.bias is not None:
            self.add_class_sums(out.bias)

    def values(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """<c_r, z_r> of each row, float64 (R,)."""
        total = self.row_weight.new_zeros(self.row_weight.numel())
        for part in self._blocks(weight.shape[1]):
            rows, classes = self.rows[part], self.classes[part]
            z = torch.linalg.vecdot(features[rows].double(), weight[classes].double())
            z = z if bias is None else z + bias[classes].double()
            total.index_add_(0, rows, self.pull[part] * z)
        return total


class _Gradient:
    """The logit gradient with the sparse term."""

    def __init__(self, inner: LogitGradient, tilt: Tilt) -> None:
        self.inner, self.tilt = inner, tilt

    def times(self, right: Tensor) -> Tensor:
        """G right."""
        return self.inner.times(right).add_(self.tilt.times(right))

    def transposed_times(self, left: Tensor) -> Tensor:
        """G' left."""
        product = self.inner.transposed_times(left)
        self.tilt.add_transposed(product, left)
        return product
