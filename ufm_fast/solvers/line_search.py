"""Strong Wolfe line search with Hager and Zhang's approximate test where the value's digits run
out.

Decisions

2026-11-25. Line searches judge by slopes where values are rounding. Values within 1e-13 |f| say
nothing; Hager and Zhang's approximate Wolfe test takes over, so the gradient goes on falling to
1e-10 of its scale and the certificate's gap, which is linear in it, to 1e-9.
"""

from __future__ import annotations

from dataclasses import dataclass

from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point

_DECREASE, _CURVATURE = 1e-4, 0.9


@dataclass(frozen=True)
class Trial:
    """A point on the line: step length, value, slope, and what was evaluated there."""

    t: float
    value: float
    slope: float
    point: Point
    evaluation: Evaluation


def _between(a: Trial, b: Trial, rounding: float) -> float:
    """Minimiser of the cubic through two values and slopes, kept a tenth away from both ends of the
    bracket.

    Where the values differ by rounding only, the root of the line through the slopes.
    """
    low, high = min(a.t, b.t), max(a.t, b.t)
    if abs(a.value - b.value) <= rounding and a.slope * b.slope < 0:
        return a.t - a.slope * (b.t - a.t) / (b.slope - a.slope)
    d1 = a.slope + b.slope - 3 * (a.value - b.value) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    t = 0.5 * (low + high)
    if square >= 0:
        d2 = square**0.5 if b.t > a.t else -(square**0.5)
        denominator = b.slope - a.slope + 2 * d2
        if denominator != 0:
            t = b.t - (b.t - a.t) * (b.slope + d2 - d1) / denominator
    margin = 0.1 * (high - low)
    return min(max(t, low + margin), high - margin)


def line_search(
    objective: Objective,
    origin: Trial,
    direction: Point,
    step: float,
    rounding: float,
    tries: int = 25,
) -> Trial | None:
    """A point with strong Wolfe conditions along ``direction`` from ``origin`` (t = 0, slope < 0),
    or None.

    ``rounding`` is the size of the value's rounding error: within it values say nothing, and a
    point is judged by its slope alone, (2 c1 - 1) slope_0 >= slope >= c2 slope_0 (Hager and Zhang,
    SIAM J. Optim. 16, 2005). Without that a search stalls when the gradient has half the digits of
    the value.
    """

    def trial(t: float) -> Trial:
        point = objective.move(origin.point, direction, t)
        found = objective.value_and_grad(point)
        along = objective.carry(origin.point, direction, t, direction)
        return Trial(t, found.value, found.gradient.dot(along), point, found)

    def good(x: Trial) -> bool:
        if (
            x.value <= origin.value + _DECREASE * x.t * origin.slope
            and abs(x.slope) <= -_CURVATURE * origin.slope
        ):
            return True
        near = x.value <= origin.value + rounding
        return near and (2 * _DECREASE - 1) * origin.slope >= x.slope >= _CURVATURE * origin.slope

    def high(x: Trial) -> bool:
        return not x.value <= origin.value + _DECREASE * x.t * origin.slope + rounding

    low, top = origin, None
    t = step
    for _ in range(tries):
        x = trial(t)
        if good(x):
            return x
        finite = x.value == x.value and abs(x.value) != float("inf") and x.slope == x.slope
        if not finite:
            top, t = None, low.t + 0.1 * (t - low.t)
            continue
        if high(x) or (x.value >= low.value + rounding and low.t > 0) or x.slope >= 0:
            if x.slope >= 0 and not high(x) and x.value <= low.value:
                low, top = x, low  # the minimum lies between the two, behind x
            else:
                top = x
        elif top is not None and (top.t - low.t) * x.slope > 0:
            low, top = x, low
        else:
            low = x
        t = max(2.0 * t, _extrapolate(origin, x)) if top is None else _between(low, top, rounding)
        if top is not None and abs(top.t - low.t) <= 1e-12 * max(abs(top.t), abs(low.t)):
            break
    return low if low.t > 0 and low.value < origin.value else None


def _extrapolate(origin: Trial, x: Trial) -> float:
    """Where the slope would vanish if it went on as from the origin to x, at most ten times as
    far.
    """
    bend = (x.slope - origin.slope) / x.t
    return min(10.0 * x.t, -origin.slope / bend) if bend > 0 else 4.0 * x.t
