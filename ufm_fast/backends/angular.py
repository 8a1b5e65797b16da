"""A head whose targets' logits have margins in the angle (`angular_margins`), by a head of the
cross-entropy that knows none.

With x_r the cosine of row r and its own class, the target's logit is t x_r - m_r, m_r = t (x_r -
c(x_r)): an additive margin, which a head takes, that moves with the point. So with G_r the row's
gradient in its logits and dx_r the change of the cosine

    gradient   that of the head, less G_ry t (1 - c') dx_r,   G_ry = -n_r p / N,
    change     S e_y = -(1 - p) G_r / n_r for the row's Hessian S in its logits: what a margin's
               change does to a row's gradient is a multiple of it, so that a Hessian product takes
               the head's own and two products with G.

On several ranks a row's class may be on another one. The rank of the row asks for that row of W, as
it does for the squared error, and sends its part of the gradient back (`exchange`): d numbers a
class and rank each way (the geometry asks once more at a point, `geometries.TiedSpheres`), and
nothing where rows are with their classes, as they are with one row for each class. The rest rides
in messages that there are: the margin, a number a row, in those of additive margins, and p comes
home with the row statistics (`sharded_sweep`). `cost` has the bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ufm_fast.angular_margins import AngularMargin, Turned
from ufm_fast.backends.exchange import home_of
from ufm_fast.backends.home import Home

if TYPE_CHECKING:
    from ufm_fast.backends.base import (
        Gradients,
        Head,
        HeadInput,
        HeadPlan,
        HeadResult,
        HeadShape,
        LogitGradient,
    )


class AngularHead:
    """The head of an input with ``angular`` margins, by ``inner`` of the cross-entropy."""

    def __init__(self, inner: Head) -> None:
        self.inner = inner

    def value_and_grad(
        self, x: HeadInput, out: Gradients, *, statistics: bool = False
    ) -> HeadResult:
        angular, home, at, additive = _unfolded(x)
        found = self.inner.value_and_grad(additive, out, statistics=True)
        assert found.statistics is not None
        assert additive.margin is not None
        p = torch.sigmoid(found.statistics.log_off_target_mass.double() + additive.margin)
        pull = x.row_weight * p
        _add(x, out, (angular.temperature * pull * at.slope)[:, None] * at.apart, home)
        reach = pull * angular.reach(x.targets.indices)
        return replace(found, statistics=found.statistics if statistics else None, reach=reach)

    def hvp(self, x: HeadInput, v: HeadInput, out: Gradients) -> None:
        angular, home, at, additive = _unfolded(x)
        t = angular.temperature
        self.inner.hvp(additive, v, out)
        l = self.inner.losses(additive)
        p, q = -torch.expm1(-l), torch.exp(-l)
        dapart = (v.features / t).sub_(home.targets(v.weight))
        dx = -_dots(at.apart, dapart)
        dm, pull = t * at.slope * dx, x.row_weight * p
        G, d = self.inner.logit_gradient(additive), x.weight.shape[1]
        GW, GdW = torch.split(G.times(torch.cat([x.weight, v.weight], 1)), d, 1)
        moved = (dm * q).to(x.features)[:, None]
        if out.features is not None:
            out.features.addcmul_(moved, GW)
        if out.weight is not None:
            out.weight.add_(G.transposed_times(moved * x.features))
        change = q * (_dots(v.features, GW) + _dots(x.features, GdW) + pull * dm)
        along = t * (change * at.slope + pull * at.bend * dx)
        _add(x, out, along[:, None] * at.apart + (t * pull * at.slope)[:, None] * dapart, home)

    def logit_gradient(self, x: HeadInput) -> LogitGradient:
        return self.inner.logit_gradient(_unfolded(x)[-1])

    def losses(self, x: HeadInput) -> Tensor:
        return self.inner.losses(_unfolded(x)[-1])

    def plan(self, shape: HeadShape) -> HeadPlan:
        """The inner head's, and the distances of all rows to their class's, with their part of the
        gradient.
        """
        plan, rows = self.inner.plan(shape), shape.rows * shape.dim * shape.itemsize
        return replace(
            plan,
            workspace=plan.workspace + 3 * rows,
            workspace_hessian=plan.workspace_hessian + 8 * rows,
        )


def _unfolded(x: HeadInput) -> tuple[AngularMargin, Home, Turned, HeadInput]:
    """The margins, where the rows' classes are and how the rows stand to them, and the same head
    with additive margins.
    """
    angular, home = x.angular, home_of(x.targets, x.layout)
    assert angular is not None
    at = angular.turned(home.targets(x.weight), x.features / angular.temperature, x.targets.indices)
    margin = angular.temperature * at.less
    return angular, home, at, replace(x, angular=None, margin=_sum(margin, x.margin))


def _sum(margin: Tensor, other: Tensor | None) -> Tensor:
    return margin if other is None else margin + other


def _dots(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(a.double(), b.double())
    return products


def _add(x: HeadInput, out: Gradients, rows: Tensor, home: Home) -> None:
    """Add ``rows`` to those of the classes, and take them off the features, which are t h."""
    assert x.angular is not None
    rows = rows.to(x.weight.dtype)
    if out.weight is not None:
        home.add_all(out.weight, rows)
    if out.features is not None:
        out.features.sub_(rows / x.angular.temperature)
