"""When a problem is solved on groups of equal counts: where that is asked for, and by itself where
nothing else is as good.

``auto`` takes groups beyond ``EXACT_CLASSES`` classes, where the certificate of the class means is
no longer exact, if dim holds the minimiser whatever it is and no option speaks of steps.
"""

from __future__ import annotations

import numpy as np

from ufm_fast.class_groups import ClassGroups
from ufm_fast.errors import InputError
from ufm_fast.groups.minimum import GroupMinimum, check_groupable, group_minimum
from ufm_fast.losses import SquaredError
from ufm_fast.problem import Problem
from ufm_fast.solvers.options import SolveOptions
from ufm_fast.theory.arguments import bias_penalty
from ufm_fast.theory.certificates.base import EXACT_CLASSES

#: Distinct counts up to which ``auto`` takes groups: a few seconds' work.
MOST_GROUPS = 512
#: Options that speak of steps.
_STEPS = (
    "method",
    "backend",
    "variables",
    "start",
    "start_scale",
    "restarts",
    "max_steps",
    "log_every",
)


def by_groups(problem: Problem, options: SolveOptions, *, begun: bool = False) -> bool:
    """Whether the options mean groups here; ``begun``: there is a point to start from.

    Errors: InputError for ``reduce`` groups of a problem or with an option that it does not serve,
    with the reason.
    """
    default = SolveOptions()
    chosen = [name for name in _STEPS if getattr(options, name) != getattr(default, name)] + [
        "start"
    ] * begun
    if options.reduce == "groups":
        check_served(problem)
        if options.backend.startswith("sharded"):
            raise InputError("reduce groups is solved in one process; start it without torchrun")
        if chosen:
            raise InputError(
                f"{chosen[0]} does not go with reduce groups, which has a method of its own; drop "
                f"{chosen[0]}"
            )
        return True
    if (
        options.reduce != "auto"
        or chosen
        or problem.num_classes <= EXACT_CLASSES
        or not serves(problem)
    ):
        return False
    groups = problem.samples.groups
    return len(groups.counts) <= MOST_GROUPS and most_rank(problem, groups) <= problem.dim


def serves(problem: Problem) -> bool:
    """Whether the reduction is exact for the problem."""
    try:
        check_served(problem)
    except InputError:
        return False
    return True


def check_served(problem: Problem) -> None:
    """Errors: InputError for a problem that groups do not reduce, naming what stands against it."""
    check_groupable(problem.loss)
    kind = problem.kind
    for clash, given in (
        (bool(problem.adjustment), "adjusted logits"),
        (problem.feature_factors is not None, "feature_penalties"),
        (problem.classifier_factors is not None, "classifier_penalties"),
        (problem.dense, "target vectors"),
        (kind.trunk != "none", f"layers = {problem.layers}"),
        (kind.geometry != "none", f"constraint {problem.constraint}"),
        (kind.frozen is not None, f"freeze {problem.freeze}"),
        (problem.dtype != "float64", f"dtype {problem.dtype}"),
    ):
        if clash:
            raise InputError(
                f"reduce groups is for one plain layer in float64, and not for {given}; use "
                f"reduce classes"
            )


def most_rank(problem: Problem, groups: ClassGroups) -> int:
    """A bound on the minimiser's rank, before it is known: classes of groups that have not
    collapsed, and the groups.
    """
    apart = (1 - problem.loss.smoothing) * np.sqrt(groups.counts) > problem.mu * groups.samples
    classes = int((groups.sizes - 1) @ apart) + len(groups.counts)
    return min(
        classes, groups.classes if isinstance(problem.loss, SquaredError) else groups.classes - 1
    )


def minimise_groups(problem: Problem, tol: float) -> GroupMinimum:
    """The problem's minimum by its groups. Errors: InputError for a dim below the rank of the
    minimiser.
    """
    penalties = problem.lambda_w, problem.lambda_h
    best = group_minimum(
        problem.samples.groups,
        *penalties,
        loss=problem.loss,
        lambda_b=bias_penalty(problem),
        tol=tol,
    )
    if best.rank > problem.dim:
        raise InputError(
            f"dim must be at least {best.rank}, the rank of the minimiser on groups, got "
            f"{problem.dim}: with a smaller one the "
            f"minimum is another; give dim {best.rank}, or reduce classes"
        )
    return best
