"""METHODS: every method by the name that ``method=`` and ``--method`` take. A new one is a file and
a row here.

A row says how the solver is made, which options it takes beside those of all, how many vectors of
the size of the parameters it holds at its peak (`plan`; measured by bench/memory.py), and which
problems it refuses and why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ufm_fast.losses import SquaredError
from ufm_fast.problem import Problem
from ufm_fast.solvers.alternating import Alternating
from ufm_fast.solvers.auto import LBFGSThenNewton
from ufm_fast.solvers.base import Solver
from ufm_fast.solvers.conjugate_gradient import ConjugateGradient
from ufm_fast.solvers.first_order import Adam, GradientDescent, SteepestDescent
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.newton_cg import NewtonCG
from ufm_fast.solvers.staged import RoundedAngles, RoundedKinks, Tempered, temperatures

if TYPE_CHECKING:
    from ufm_fast.solvers.options import SolveOptions

HISTORY, MOMENTUM = 10, 0.9


def _none(problem: Problem) -> None:
    return None


@dataclass(frozen=True)
class SolverSpec:
    """A row. ``vectors``: beside the point and its gradient, the next point and its gradient
    included; of methods with a history 2 a pair more. ``refuses``: what is wrong with a problem, in
    words that go on after the method's name, or None.
    """

    make: Callable[[Problem, SolveOptions], Solver]
    vectors: int
    options: tuple[str, ...] = ()
    refuses: Callable[[Problem], str | None] = _none


def _auto(problem: Problem, options: SolveOptions) -> Solver:
    """L-BFGS with a Newton-CG finish; of the ReLU, and of margins in the angle, through ever less
    rounded kinks, on spheres through other temperatures.
    """
    history = options.history or HISTORY
    if problem.activation == "relu":
        return RoundedKinks(history, LBFGS(history), options.tol)
    solver = LBFGSThenNewton(history)
    if problem.angular is not None:
        return RoundedAngles(history, solver, options.tol)
    tempered = problem.constraint == "sphere" and temperatures(problem)
    return Tempered(history, solver, options.tol) if tempered else solver


def _descent(
    *, momentum: bool = False, nesterov: bool = False
) -> Callable[[Problem, SolveOptions], Solver]:
    def make(problem: Problem, options: SolveOptions) -> Solver:
        beta = (options.momentum or MOMENTUM) if momentum else 0.0
        return GradientDescent(options.learning_rate, beta, nesterov)

    return make


def _steepest(name: str) -> Callable[[Problem, SolveOptions], Solver]:
    return lambda problem, options: SteepestDescent(name, options.learning_rate)


def _needs_squares(problem: Problem) -> str | None:
    if problem.kind.trunk != "none" or problem.kind.geometry != "none":
        return "goes with one layer and no constraint; use lbfgs"
    if problem.classifier_factors is not None:
        return "goes with one penalty on W, not with classifier_penalties; use lbfgs"
    squared = isinstance(problem.loss, SquaredError)
    return (
        None
        if squared
        else f"goes with the squared error (mse) only, got {problem.loss.name}; use lbfgs"
    )


_OF_RATE = ("learning_rate",)

METHODS: dict[str, SolverSpec] = {
    "auto": SolverSpec(_auto, 4, ("history",)),
    "gd": SolverSpec(_descent(), 2, _OF_RATE),
    "momentum": SolverSpec(_descent(momentum=True), 4, (*_OF_RATE, "momentum")),
    "nesterov": SolverSpec(_descent(momentum=True, nesterov=True), 5, (*_OF_RATE, "momentum")),
    "sign": SolverSpec(_steepest("sign"), 2, _OF_RATE),
    "spectral": SolverSpec(_steepest("spectral"), 2, _OF_RATE),
    "adam": SolverSpec(lambda problem, options: Adam(options.learning_rate), 7, _OF_RATE),
    "lbfgs": SolverSpec(
        lambda problem, options: LBFGS(options.history or HISTORY), 4, ("history",)
    ),
    "cg": SolverSpec(lambda problem, options: ConjugateGradient(), 7),
    "newton-cg": SolverSpec(lambda problem, options: NewtonCG(), 5),
    "alternating": SolverSpec(lambda problem, options: Alternating(), 2, (), _needs_squares),
    "closed-form": SolverSpec(lambda problem, options: NewtonCG(), 1),  # evaluates its point only
}
