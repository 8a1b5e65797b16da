"""Which Gauss-Newton model preconditions a problem: that of the squared error, or of several targets a row, or none."""

from __future__ import annotations

from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers import squared_model, target_coupling
from ufm_fast.solvers.squared_model import SquaredPreconditioner
from ufm_fast.solvers.target_coupling import TargetPreconditioner

Model = SquaredPreconditioner | TargetPreconditioner


#: The step of L-BFGS that builds a model which is not built at once.
LATER = squared_model.FIRST


def at_once(objective: Objective) -> bool:
    """Whether L-BFGS begins with the model."""
    return target_coupling.applicable(objective)


def later(objective: Objective) -> bool:
    """Whether it builds one at step ``LATER``."""
    return squared_model.applicable(objective)


def build(objective: Objective, x: Point) -> Model | None:
    """The model at a point in the solver's variables; None where there is none, or rounding leaves nothing to invert."""
    if squared_model.applicable(objective):
        return SquaredPreconditioner.build(objective, x)
    return TargetPreconditioner.build(objective, x) if target_coupling.applicable(objective) else None


def start(objective: Objective, x: Point, evaluation: Evaluation, *, lower: bool) -> tuple[Point, Evaluation, Model | None]:
    """The model where it is best built, that point and its evaluation: the squared error's factors are balanced first.

    With ``lower`` only where that lowers the value by more than its rounding.
    """
    if squared_model.applicable(objective):
        x, evaluation = squared_model.move(objective, x, evaluation, lower=lower)
    return x, evaluation, build(objective, x)
