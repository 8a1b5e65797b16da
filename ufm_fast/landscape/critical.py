"""Which kind of critical point a point is, and the way out of a saddle."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ufm_fast.arguments import number
from ufm_fast.errors import InputError
from ufm_fast.geometries import TiedSpheres
from ufm_fast.landscape.curvature import Curvature, curvature_unit, rounding, smallest_curvature
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.theory.certificates import Certificate, certify

NOT_CRITICAL = "not critical"
STRICT_SADDLE = "strict saddle"
NO_NEGATIVE_CURVATURE = "no negative curvature found"
GLOBAL_MINIMUM = "global minimum (certified)"

#: Inputs of a ReLU that are zero but for rounding, against the largest of their layer.
_KINK = 1e-8


@dataclass(frozen=True)
class Landscape:
    """The verdict on a point and what it rests on.

    ``classification``, the first of these that holds:
    - 'not critical': ``relative_gradient`` is above the tolerance;
    - 'strict saddle': the Rayleigh quotient is below -``threshold``, which is a proof. At a kink it
      is that of the active piece alone and proves nothing, so there the value has to fall along the
      vector too;
    - 'global minimum (certified)': the certificate says so;
    - 'no negative curvature found': none below ``curvature.lower_bound``, but for its failure
      probability.

    ``kinks``: inputs of ReLUs that are zero, ``tied``: rows at the kink of their margin in the
    angle; ``note`` says what that means here. ``certificate`` is
    None at a point that is not critical. Of one layer it has a ``spectral_ratio`` S, and mu (1 - S)
    is the eigenvalue to expect of a point of rank below d.
    """

    classification: str
    curvature: Curvature
    value: float
    gradient_norm: float
    relative_gradient: float
    threshold: float
    kinks: int
    certificate: Certificate | None
    tied: int = 0

    @property
    def note(self) -> str:
        """What is to be said of kinks, empty where there are none."""
        if self.tied:
            return (
                f"{self.tied:,} rows lie on their class's, at the kink of their angle: the "
                f"curvature is along what keeps them there"
            )
        if not self.kinks:
            return ""
        said = (
            f"{self.kinks:,} inputs of ReLUs are zero: the curvature is that of the active piece, "
            f"on which they rest"
        )
        if self.classification == STRICT_SADDLE:
            return f"{said}; the value falls along its vector"
        if (
            self.classification == NO_NEGATIVE_CURVATURE
            and self.curvature.eigenvalue < -self.threshold
        ):
            return f"{said}; along its vector they do not, and the value does not fall"
        return said

    def summary(self) -> dict[str, Any]:
        """JSON-ready dictionary, without the vector."""
        found = {
            name: item
            for name, item in vars(self).items()
            if name not in ("curvature", "certificate")
        }
        curvature = {name: item for name, item in vars(self.curvature).items() if name != "vector"}
        return {
            **found,
            **curvature,
            "note": self.note,
            "certificate": None if self.certificate is None else asdict(self.certificate),
        }


@torch.no_grad()
def classify(
    objective: Objective, x: Point, *, tol: float = 1e-6, max_products: int = 200, seed: int = 0
) -> Landscape:
    """The verdict on a point x in the objective's variables (`Landscape`).

    Critical is a gradient of at most ``tol`` times its scale. Curvature counts as negative below
    1e-8 units (`curvature_unit`), or 10 times the relative gradient where that is more: at a point
    that is not quite critical even rotations, along which the function is constant, have Rayleigh
    quotients of the order of the gradient. Errors: InputError for a point where the objective is
    not finite, and those of `smallest_curvature`.
    """
    if not 0 < number(tol, "tol") < 1:
        raise InputError(f"tol must lie in (0, 1), got {tol}")
    at, unit = objective.value_and_grad(x), curvature_unit(objective)
    gradient = at.gradient.norm()
    if not (math.isfinite(at.value) and math.isfinite(gradient)):
        raise InputError(
            f"the value at this point is {at.value}; give one where value and gradient are finite"
        )
    relative = gradient / max(objective.gradient_scale(x), unit)
    certificate = (
        certify(objective.problem, objective.rows, objective.to_model(x))
        if relative <= tol
        else None
    )
    certified = certificate is not None and certificate.certified
    thorough = (
        certificate is not None and not certified
    )  # all that can be said of such a point may be the lower bound
    kinks = kinks_at(objective, x)
    piece = objective.resting(_KINK) if kinks else objective
    found = smallest_curvature(piece, x, max_products=max_products, thorough=thorough, seed=seed)
    threshold = max(
        unit * max(1e-8, 10 * relative), rounding(objective, found.eigenvalue, found.largest)
    )
    if relative > tol:
        verdict = NOT_CRITICAL
    elif found.eigenvalue < -threshold and (not kinks or _falls(objective, x, found, at.value)):
        verdict = STRICT_SADDLE
    else:
        verdict = GLOBAL_MINIMUM if certified else NO_NEGATIVE_CURVATURE
    tied = objective.geometry.together(x) if isinstance(objective.geometry, TiedSpheres) else 0
    return Landscape(
        verdict, found, at.value, gradient, relative, threshold, kinks, certificate, tied
    )


def kinks_at(objective: Objective, x: Point) -> int:
    """Inputs of piecewise linear activations that are zero, or 1e-8 of the largest of their layer:
    there a ReLU has a kink.
    """
    tape, total = objective.forward(x), 0
    for A, W, slope, bend in zip(tape.inputs, tape.layers, tape.slopes, tape.bends, strict=False):
        if slope is not None and bend is None:
            sizes = (A @ W.T).abs()
            total += int((sizes <= _KINK * sizes.max()).sum())
    return total


def _falls(objective: Objective, x: Point, curvature: Curvature, before: float) -> bool:
    """Whether the value near x falls along the vector, either way, by half of what the curvature
    promises.
    """
    t = 1e-3 * max(x.norm(), 1.0)
    ends = (objective.value_and_grad(objective.move(x, curvature.vector, s)).value for s in (t, -t))
    return any(value <= before + 0.25 * curvature.eigenvalue * t**2 for value in ends)


@torch.no_grad()
def escape(objective: Objective, x: Point, curvature: Curvature) -> Point:
    """The lowest point met on the geodesic through x along the vector of negative curvature, either
    way.

    Steps are halved until the value falls by half of what the curvature promises, |eigenvalue| t^2
    / 2, then doubled while it goes on falling. Errors: InputError where the curvature is not
    negative, or no step falls (across a kink it may not).
    """
    if not curvature.eigenvalue < 0:
        raise InputError(
            f"the curvature is {curvature.eigenvalue:.3g}; there is a way out only where it is "
            f"negative"
        )
    before = objective.value_and_grad(x).value

    def along(t: float) -> tuple[float, Point]:
        there = objective.move(x, curvature.vector, t)
        return objective.value_and_grad(there).value, there

    ends = [
        end
        for sign in (1.0, -1.0)
        if (end := _fall(along, before, curvature.eigenvalue, sign * max(x.norm(), 1.0)))
    ]
    if not ends:
        raise InputError(
            "no step along the vector lowers the value beyond rounding; start a solve from "
            "another point"
        )
    return min(ends, key=lambda end: end[0])[1]


def _fall(
    along: Callable[[float], tuple[float, Point]], before: float, eigenvalue: float, t: float
) -> tuple[float, Point] | None:
    """The lowest value on the ray of t, and its point; None if all that may fall is rounding."""
    found = along(t)
    while not found[0] <= before + 0.25 * eigenvalue * t**2:
        t /= 2
        if abs(eigenvalue) * t**2 <= 1e-14 * abs(before):
            return None
        found = along(t)
    while (further := along(2 * t))[0] < found[0]:
        t, found = 2 * t, further
    return found
