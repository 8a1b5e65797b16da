"""Margins in the angle, of unit rows (ArcFace, Deng et al., arXiv 1801.07698): a target's logit is

    t c(x),   c(x) = cos(theta + m) = x cos m - sin m sqrt(1 - x^2),   x = cos(theta) = <w_y, h>,

in the place of t x, up to theta + m = pi, and -t beyond, so that c is once differentiable and never
falls in x. (The paper leaves the rest open; implementations jump to a line there.)

**The kink.** c is convex in x and the loss falls in it, so the loss is not convex in the logits.
At theta = 0 c' = cos m + sin m x / sqrt(1 - x^2) is infinite: with a = h - w_y, |a| is the distance
and sqrt(1 - x^2) = |a| sqrt(1 - |a|^2 / 4), so that the loss has the kink of a norm, t p sin m |a|
with p = 1 - p_y. That is where minima lie: a row stays on its own class's row while what the other
classes pull at it sideways is no more than that reach, as it is at the simplex, where it is zero.

**Rounding.** With sqrt(1 - x^2 + e^2) - e in the place of sqrt(1 - x^2) everything is smooth. Still
c <= x cos m, with equality at theta = 0, so that the bound of `theory.angular_ce_minimum` holds for
every e: at the simplex the rounded problem has the same minimum and the same minimisers.

**Together.** Pairs w_y = h are a great sphere of the product of two spheres (its diagonal, totally
geodesic), on which the loss is smooth: there c is x cos m to second order. So rows at the kink are
held together (`geometries.TiedSpheres`): their tangents are equal, which is the gradient of least
norm as long as the difference is within the reach, and what exceeds it is left over and takes them
apart. A solver goes through ever smaller e, puts rows that have come close on their class's row,
and ends on the exact loss (`solvers.staged.RoundedAngles`).

**Digits.** x enters as 1 - |a|^2 / 2, whose gradient along the spheres is that of <w_y, h>: where
c' is 1/e the gradient's difference of nearly equal vectors is then a itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ufm_fast.adjustments import for_each_class
from ufm_fast.errors import InputError

#: Rows this many eps apart, of a row of length one, lie at the kink.
_TOGETHER = 100.0


class Turned(NamedTuple):
    """Of each row (R,), float64: x - c(x), its first and second derivative in x; and a = h - w_y,
    R x d.
    """

    less: Tensor
    slope: Tensor
    bend: Tensor
    apart: Tensor


@dataclass(frozen=True, eq=False)
class AngularMargin:
    """``angles`` m_k in radians, float64 (K,); ``rounding`` e of their kinks."""

    angles: Tensor
    temperature: float
    rounding: float = 0.0

    def turned(self, own: Tensor, H: Tensor, labels: Tensor) -> Turned:
        """What unit rows H, of these labels, have taken off the cosines with ``own``, their
        classes' rows of W.
        """
        m, e = self.angles[labels], self.rounding
        cos, sin, reach = m.cos(), m.sin(), math.hypot(1.0, e)
        apart = H - own
        square = apart.double().square().sum(1)
        x, below = 1.0 - 0.5 * square, (square * (1.0 - 0.25 * square)).clamp_min(0.0)
        root = (below + e * e).sqrt()
        flat, kink = x <= -reach * cos, root == 0.0
        safe = root.masked_fill(kink, 1.0)
        less = torch.where(flat, x + reach - sin * e, x * (1.0 - cos) + sin * below / (safe + e))
        slope = torch.where(flat, 1.0, 1.0 - cos - torch.where(kink, 0.0, sin * x / safe))
        bend = torch.where(flat | kink, 0.0, -sin * reach**2 / safe**3)
        return Turned(less, slope, bend, apart)

    def reach(self, labels: Tensor) -> Tensor:
        """Of each row at the kink: what it withstands sideways, as a part of its weight times p."""
        reach: Tensor = self.temperature * self.angles[labels].sin()
        return reach


def together(own: Tensor, H: Tensor) -> Tensor:
    """Which rows of H lie on ``own``, their classes' rows of W, but for rounding, bool (R,)."""
    eps: float = torch.finfo(H.dtype).eps
    apart: Tensor = torch.linalg.vector_norm(H - own, dim=1)
    return apart <= _TOGETHER * eps


def make_angular(
    counts: Tensor, given: Any, temperature: float, device: torch.device | str
) -> AngularMargin | None:
    """The margins that ``angular_margin`` gives, one number or K; None where all are zero.

    Errors: InputError / InputTypeError for other than radians in [0, pi/2).
    """
    angles = for_each_class("angular_margin", given, counts.double().cpu())
    if angles is None:
        return None
    outside = angles[(angles < 0) | (angles >= math.pi / 2)]
    if outside.numel():
        raise InputError(
            f"angular_margin must lie in [0, pi/2) radians, got {float(outside[0])}; ArcFace "
            f"has 0.5"
        )
    return AngularMargin(angles.to(device), temperature)
