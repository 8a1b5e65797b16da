"""What is said of the point that a run ends at: its value where it is saved, and whether theory
agrees.

Value, gap and certificate are of one point, the one that is saved. In bfloat16 a solver evaluates
the rounding of its parameters, which are kept in float32; those are saved, so the value is taken
there anew.

Theory and value check one another. A value below a closed form shows that the form is wrong, and a
closed form is called a minimum only where its point is certified, or stationary with the value that
it claims.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import torch

from ufm_fast.errors import Contradiction
from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.minimise import Run
from ufm_fast.solvers.solution import Outcome
from ufm_fast.theory import ClosedForm
from ufm_fast.theory.certificates import Certificate
from ufm_fast.theory.separation import held_together

#: Relative; values in float64 of equal minima differ by less.
AGREEMENT = 1e-9


def at_saved_point(objective: Objective, run: Run, model: Point, *, exactly: bool) -> Evaluation:
    """Value and gradient at the model point that is saved: ``exactly`` in float64, else at least in
    float32; of unit rows with the rounding of their lengths taken off.
    """
    problem = objective.problem
    dtype = "float64" if exactly else "float32" if problem.dtype == "bfloat16" else problem.dtype
    if dtype == problem.dtype:
        return run.state.evaluation
    backend = None if objective.layout is None else objective.backend
    wide = Objective(
        replace(problem, dtype=dtype), backend=backend, reduce=objective.reduce, variables="raw"
    )
    return wide.value_and_grad(wide.geometry.project(model.to(dtype=wide.dtype)))


def of_closed_form(
    objective: Objective,
    run: Run,
    theory: ClosedForm,
    value: float,
    certificate: Certificate | None,
) -> tuple[Outcome, str]:
    """How a run by the closed form ended: converged only where its point is proved to be a
    minimum.
    """
    if certificate is not None and certificate.certified:
        return Outcome.CONVERGED, run.message
    rounding = 1e3 * torch.finfo(objective.problem.torch_dtype).eps
    scale = objective.gradient_scale(run.state.point)
    stationary = run.state.evaluation.gradient.norm() <= max(1e-8, rounding) * scale
    if stationary and abs(value - theory.value) <= max(AGREEMENT, rounding) * theory.value:
        return Outcome.CONVERGED, run.message
    return Outcome.MAX_STEPS, "the closed form's point is no proven minimum here; use method auto"


def contradiction(objective: Objective, theory: ClosedForm | None, value: float) -> str:
    """A warning, and the same in words, if a value (in float64) lies below the closed form; else
    nothing.
    """
    slack = 10 * objective.value_floor
    if (
        theory is None
        or not math.isfinite(value)
        or value >= theory.value * (1 - AGREEMENT) - slack
    ):
        return ""
    words = (
        f"the value lies below the closed form {theory.value:.15g}, which is wrong here: please "
        f"report it"
    )
    warnings.warn(words, Contradiction, stacklevel=3)
    return words


def notes(
    problem: Problem,
    theory: ClosedForm | None,
    certificate: Certificate | None,
    outcome: Outcome,
    value: float,
) -> list[str]:
    """What a user should know of a solution and could not tell from its numbers."""
    said = [held_together(problem, theory), _empty_classes(problem), _never_alone(problem)]
    reached = theory is not None and abs(value - theory.value) <= 1e-6 * abs(theory.value)
    if outcome.success and not reached and certificate is not None and certificate.kind != "none":
        said.append("" if certificate.certified else _not_proved(problem, certificate))
    return [words for words in said if words]


def of_start(problem: Problem, start: str) -> list[str]:
    """What a user should know of a start by name."""
    if problem.layers > 1 and start == "small":
        return [
            "start small: with layers zero is a strict local minimum, and that is where it ends; "
            "orthogonal starts away"
        ]
    return []


def _empty_classes(problem: Problem) -> str:
    empty = torch.nonzero(problem.counts == 0).reshape(-1).tolist()
    if not empty:
        return ""
    if empty == [0]:
        return (
            "class 0 has no samples and every other class has: labels that begin at 1 must be "
            "numbered from 0"
        )
    some = ", ".join(map(str, empty[:5])) + (", .." if len(empty) > 5 else "")
    return f"{len(empty):,} of {problem.num_classes:,} classes have no samples: {some}"


def _never_alone(problem: Problem) -> str:
    sets = problem.target_sets
    if sets is None or sets.weights is not None or bool((sets.indptr.diff() == 1).all()):
        return ""
    single = sets.indices[sets.indptr[:-1][sets.indptr.diff() == 1]]
    missing = torch.nonzero(
        (torch.bincount(single, minlength=problem.num_classes) == 0) & (problem.counts > 0)
    ).reshape(-1)
    if missing.numel() == 0:
        return ""
    some = ", ".join(map(str, missing[:5].tolist())) + (", .." if missing.numel() > 5 else "")
    return (
        f"{missing.numel():,} labels never stand alone: {some}; tag averages of sets with them "
        f"are nan"
    )


def _not_proved(problem: Problem, certificate: Certificate) -> str:
    least, rank = (
        (problem.num_classes, "t") if problem.dense else (problem.num_classes - 1, "K - 1")
    )
    narrow = problem.dim < least
    if problem.layers == 1 and problem.loss.convex and not narrow and problem.angular is None:
        return (
            f"no proven minimum: the value lies up to {certificate.relative_gap:.1e} of itself "
            f"above it; lower tol, or go on"
        )
    why = (
        "several layers"
        if problem.layers > 1
        else "margins in the angle"
        if problem.angular is not None
        else f"d < {rank}"
        if narrow
        else f"the loss {problem.loss.name} is not convex"
    )
    return f"local minimum; the bound is not tight here ({why})"
