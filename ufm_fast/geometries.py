"""The space that points live in: flat, or spheres on which the rows of W and H stay (arXiv
2209.09211).

A solver asks a geometry for four things: the part of a gradient along the space (``split``), the
Hessian product in the space, a move along a geodesic, and a tangent carried along that move. What a
gradient leaves out, its normal part, is one number a row; it curves the space's Hessian, and a
tangent gradient is small against it. Another constraint is a class and a row of GEOMETRIES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ufm_fast.angular_margins import together
from ufm_fast.point import Point

if TYPE_CHECKING:
    from ufm_fast.backends.home import Home


class Flat:
    """All of R^n: no normal part, straight lines."""

    curved = False

    def split(self, x: Point, gradient: Point) -> tuple[Point, Point | None]:
        """The tangent part of a Euclidean gradient at x and its normal part, a column of W and one
        of H (None: zero).
        """
        return gradient, None

    def tangent(self, x: Point, v: Point) -> Point:
        """The part of v along the space."""
        return self.split(x, v)[0]

    def hessian(self, x: Point, v: Point, normal: Point | None, product: Point) -> Point:
        """The Hessian product in the space of a tangent v, from the Euclidean one and the
        gradient's normal part.
        """
        return product

    def move(self, x: Point, direction: Point, t: float) -> Point:
        """The point at t on the geodesic that leaves x in that direction."""
        return x.axpy(t, direction)

    def carry(self, x: Point, direction: Point, t: float, v: Point) -> Point:
        """A tangent v at x, transported in parallel along that move: lengths and angles stay."""
        return v

    def project(self, x: Point) -> Point:
        """The point of the space that is nearest to x."""
        return x

    def held(self, x: Point) -> int:
        """How many dimensions the tangents at x have less than there are numbers."""
        return 0


class Spheres(Flat):
    """Rows of W and H of length one; a bias or layers, if any, stay flat.

    With a = <x, g> for each row: the tangent part is g - a x, and the Riemannian Hessian product
    P(Hess v) - a v.
    Source: Absil, Mahony and Sepulchre, Optimization Algorithms on Matrix Manifolds, section 5;
    arXiv 2209.09211.
    """

    curved = True

    def split(self, x: Point, gradient: Point) -> tuple[Point, Point | None]:
        normal = Point(_along(x.W, gradient.W), _along(x.H, gradient.H), layout=x.layout)
        return _rows(lambda x, g, a: g - a * x, x, gradient, normal, rest=gradient), normal

    def hessian(self, x: Point, v: Point, normal: Point | None, product: Point) -> Point:
        assert normal is not None
        return self.tangent(x, _rows(lambda p, a, v: p - a * v, product, normal, v, rest=product))

    def move(self, x: Point, direction: Point, t: float) -> Point:
        def turned(x: Tensor, d: Tensor) -> Tensor:
            angle = t * _length(d)
            return _unit(torch.cos(angle) * x + torch.sinc(angle / torch.pi) * t * d)

        return _rows(turned, x, direction, rest=x.axpy(t, direction))

    def carry(self, x: Point, direction: Point, t: float, v: Point) -> Point:
        def turned(x: Tensor, d: Tensor, v: Tensor) -> Tensor:
            n = _length(d)
            u = d / n.clamp_min(torch.finfo(d.dtype).tiny)
            share = _along(u, v)
            return v + share * ((torch.cos(t * n) - 1.0) * u - torch.sin(t * n) * x)

        return _rows(turned, x, direction, v, rest=v)

    def project(self, x: Point) -> Point:
        return _rows(_unit, x, rest=x)

    def held(self, x: Point) -> int:
        return x.W.shape[0] + x.H.shape[0]


class TiedSpheres(Spheres):
    """Spheres on which rows of H that lie on their class's row of W stay there, where they have a
    kink (``kinked``, (R,)): the two move as one (`angular_margins`). ``home``: where the classes'
    rows are.

    On several ranks the one that has a row decides whether it is tied, and what of its gradient is
    left over; the rank of its class is told, in the sums that it gets. So no two ranks ever decide
    the same thing.
    """

    def __init__(self, home: Home, kinked: Tensor) -> None:
        self.home, self.kinked = home, kinked
        self._last: tuple[Point, Tensor | None] | None = None

    def _tied_rows(self, x: Point) -> Tensor | None:
        """Which rows are tied at x, bool (R,); None where none is, on any rank. That of the last
        point is kept: a line search moves from it many times.
        """
        if self._last is None or self._last[0] is not x:
            tied = together(self.home.targets(x.W), x.H) & self.kinked
            self._last = x, tied if x.summed(float(tied.sum())) else None
        return self._last[1]

    def tied(self, x: Point, v: Point, reach: Tensor | None = None) -> Point:
        """A tangent v with equal rows where rows of x are tied: their mean, the nearest. What they
        differ from it by is left out up to ``reach`` (R,), without it whole.
        """
        tied = self._tied_rows(x)
        if tied is None:
            return v
        one, W, home = tied.to(v.W.dtype), v.W.clone(), self.home
        home.add_all(W, v.H, one)
        W /= (1.0 + home.totals(len(W), one))[:, None].to(W.dtype)
        mean = home.targets(W)
        rest = torch.zeros_like(mean)
        if reach is not None:
            off = v.H - mean
            size = _length(off)
            part = 1.0 - reach[:, None].to(size) / size.clamp_min(1e-300)
            rest = off * (part.clamp_min(0.0) * one[:, None])
            home.add_all(W, -rest)
        return replace(v, W=W, H=torch.where(tied[:, None], mean + rest, v.H))

    def joined(self, x: Point, near: float) -> Point:
        """x with the rows of H put on their class's row of W that are no further than that from
        it.
        """
        own = self.home.targets(x.W)
        return replace(x, H=torch.where(_length(x.H - own) <= near, own, x.H))

    def together(self, x: Point) -> int:
        """How many rows of H are tied."""
        tied = self._tied_rows(x)
        return 0 if tied is None else int(x.summed(float(tied.sum())))

    def held(self, x: Point) -> int:
        return super().held(x) + self.together(x) * (x.H.shape[1] - 1)

    def tangent(self, x: Point, v: Point) -> Point:
        return self.tied(x, super().tangent(x, v))

    def move(self, x: Point, direction: Point, t: float) -> Point:
        moved, tied = super().move(x, direction, t), self._tied_rows(x)
        if tied is None:
            return moved
        off = _length(direction.H - self.home.targets(direction.W))
        stay = tied[:, None] & (off <= 1e-8 * _length(direction.H))
        return replace(moved, H=torch.where(stay, self.home.targets(moved.W), moved.H))


def _rows(function: Callable[..., Tensor], *points: Point, rest: Point) -> Point:
    """``function`` of the rows of W and of H of the points; bias and layers of ``rest``."""
    W, H = function(*(p.W for p in points)), function(*(p.H for p in points))
    return replace(rest, W=W, H=H)


def _along(x: Tensor, g: Tensor) -> Tensor:
    products: Tensor = torch.linalg.vecdot(x, g)
    return products[:, None]


def _length(x: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return lengths


def _unit(x: Tensor) -> Tensor:
    return x / _length(x).clamp_min(torch.finfo(x.dtype).tiny)


#: Geometries by the name that ``constraint=`` takes.
GEOMETRIES: dict[str, type[Flat]] = {"none": Flat, "sphere": Spheres}
