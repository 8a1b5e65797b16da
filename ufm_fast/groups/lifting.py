"""A grouped minimum as a Solution with W, H and b, where those fit the memory."""

from __future__ import annotations

import math

import torch

from ufm_fast.errors import InputError
from ufm_fast.groups.metrics import group_metrics
from ufm_fast.groups.minimum import GroupMinimum
from ufm_fast.memory import available_bytes
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.solution import Outcome, Solution
from ufm_fast.theory import closed_form

METHOD = "newton on groups"


def outcome(minimum: GroupMinimum) -> tuple[Outcome, str]:
    """How the solve ended, and what is to be said of it."""
    if minimum.converged:
        return Outcome.CONVERGED, f"minimiser of rank {minimum.rank}"
    return (
        Outcome.STALLED,
        f"minimiser of rank {minimum.rank}; rounding leaves a gap of "
        f"{minimum.certificate.relative_gap:.1e}",
    )


def lifted_solution(
    problem: Problem, minimum: GroupMinimum, *, certificate: bool, metrics: bool
) -> Solution:
    """The Solution with the point in the problem's dim. Errors: InputError where W and H do not fit
    the free memory.
    """
    needed = 3 * 8 * (2 * problem.num_classes) * problem.dim  # both factors, and their making
    free = available_bytes(torch.device("cpu"))
    if needed > free:
        raise InputError(
            f"W and H of {problem.num_classes} x {problem.dim} do not fit ({needed / 1e9:.3g} GB "
            f"needed, {free / 1e9:.3g} GB "
            "free): ufm_fast.groups.group_minimum, or ufm-fast solve, gives the minimum without "
            "them"
        )
    W, means, b = minimum.lifted(problem.dim)
    point = Point(W, means[problem.counts > 0], b).to(device=problem.device)
    ended, message = outcome(minimum)
    return Solution(
        problem=problem,
        point=point,
        value=minimum.value,
        data_value=minimum.data_value,
        gradient_norm=math.nan,
        steps=minimum.steps,
        evaluations=minimum.steps,
        seconds=minimum.seconds,
        outcome=ended,
        message=message,
        method=METHOD,
        backend="groups",
        reduce="groups",
        variables="groups",
        start="groups",
        theory=closed_form(problem),
        certificate=minimum.certificate if certificate else None,
        metrics=group_metrics(minimum) if metrics else {},
    )
