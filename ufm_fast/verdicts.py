"""What is said of the point that a run ends at: its value where it is saved, and whether theory agrees.

Value, gap and certificate are of one point, the one that is saved. In bfloat16 a solver evaluates the
rounding of its parameters, which are kept in float32; those are saved, so the value is taken there anew.

Theory and value check one another. A value below a closed form shows that the form is wrong, and a closed
form is called a minimum only where its point is certified, or stationary with the value that it claims.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch

from ufm_fast.errors import Contradiction
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.solvers.minimise import Run
from ufm_fast.solvers.solution import Outcome
from ufm_fast.theory import ClosedForm
from ufm_fast.theory.certificates import Certificate

#: Relative; values in float64 of equal minima differ by less.
AGREEMENT = 1e-9


def at_saved_point(objective: Objective, run: Run, model: Point, *, exactly: bool) -> Evaluation:
    """Value and gradient at the model point that is saved: ``exactly`` in float64, else at least in float32."""
    problem = objective.problem
    dtype = "float64" if exactly else "float32" if problem.dtype == "bfloat16" else problem.dtype
    if dtype == problem.dtype:
        return run.state.evaluation
    wide = Objective(replace(problem, dtype=dtype), reduce=objective.reduce, variables="raw")
    return wide.value_and_grad(model.to(dtype=wide.dtype))


def of_closed_form(
    objective: Objective, run: Run, theory: ClosedForm, value: float, certificate: Certificate | None
) -> tuple[Outcome, str]:
    """How a run by the closed form ended: converged only where its point is proved to be a minimum."""
    if certificate is not None and certificate.certified:
        return Outcome.CONVERGED, run.message
    rounding = 1e3 * torch.finfo(objective.problem.torch_dtype).eps
    scale = objective.gradient_scale(run.state.point)
    stationary = run.state.evaluation.gradient.norm() <= max(1e-8, rounding) * scale
    if stationary and abs(value - theory.value) <= max(AGREEMENT, rounding) * theory.value:
        return Outcome.CONVERGED, run.message
    return Outcome.MAX_STEPS, "the closed form's point is no proven minimum here; use method auto"


def contradiction(objective: Objective, theory: ClosedForm | None, value: float) -> str:
    """A warning, and the same in words, if a value (in float64) lies below the closed form; else nothing."""
    slack = 10 * objective.value_floor
    if theory is None or not math.isfinite(value) or value >= theory.value * (1 - AGREEMENT) - slack:
        return ""
    words = f"the value lies below the closed form {theory.value:.15g}, which is wrong here: please report it"
    warnings.warn(words, Contradiction, stacklevel=3)
    return words
