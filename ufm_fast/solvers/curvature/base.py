"""What a curvature is: when it serves, when L-BFGS builds its model of the Hessian, and where."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point


class Model(Protocol):
    """The inverse of an approximate Hessian."""

    def apply(self, g: Point) -> Point:
        """Its product with a gradient, a new point."""


class Built(NamedTuple):
    """A model, or None where rounding leaves nothing to invert, at the point that it is best built
    at, and its evaluation.
    """

    point: Point
    evaluation: Evaluation
    model: Model | None


class Curvature(Protocol):
    """A kind of model. ``newton``: Newton-CG preconditions with it too."""

    name: str
    newton: bool

    def serves(self, objective: Objective) -> bool:
        """Whether it is a model of this objective. Nothing that it was not made for may pass."""

    def bytes_of(self, objective: Objective) -> int:
        """What a model holds, and building it takes, beside points and gradients."""

    def work(self, objective: Objective) -> tuple[float, float]:
        """Numbers that using it passes over, and floating-point operations of building it, of one
        step.
        """

    def begin(self, objective: Objective, point: Point) -> Built:
        """Where L-BFGS begins, with a model or without one yet."""

    def due(self, age: int, *, built: bool) -> bool:
        """Whether L-BFGS builds at this step; ``built``: there is a model already."""

    def build(
        self, objective: Objective, point: Point, evaluation: Evaluation, *, lower: bool = False
    ) -> Built:
        """The model near a point. With ``lower`` it may be moved only to where the value falls by
        more than its rounding.
        """
