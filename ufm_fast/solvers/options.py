"""SolveOptions: everything that a solve may be told, checked once, in one place."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from ufm_fast.arguments import number, whole
from ufm_fast.backends import make_backend
from ufm_fast.errors import InputError, InputTypeError
from ufm_fast.metrics.pairwise import Mode as Pairwise
from ufm_fast.problem import REDUCTIONS, Problem
from ufm_fast.scales import VARIABLES
from ufm_fast.solvers.table import METHODS
from ufm_fast.starts import DEFAULT_START, RANDOM_STARTS, STARTS

PAIRWISE = ("auto", "exact", "sampled", "none")
_CHOICES = {
    "method": METHODS,
    "variables": VARIABLES,
    "start": STARTS,
    "reduce": REDUCTIONS,
    "pairwise": PAIRWISE,
}
_LEAST = {"max_steps": 0, "log_every": 1, "history": 1, "restarts": 1}


@dataclass(frozen=True)
class SolveOptions:
    """Options of ``solve``.

    - ``method``: a name of METHODS. 'auto' is L-BFGS with a Newton-CG finish (of the ReLU, with its
      kinks rounded ever less; on spheres, through other temperatures), always iterative.
    - ``backend``: 'auto', 'reference', 'tiled', 'triton', or on several ranks 'sharded',
      'sharded-tiled', 'sharded-triton'; ``mesh``: its ranks, CxS, by default all by classes, or
      with target vectors of fewer outputs than rows all by samples.
    - ``reduce``: 'classes' (and 'auto') solves one row for each class or target set, exact; 'none'
      one a sample; 'groups' the numbers of classes of equal count, exact too (`ufm_fast.groups`),
      which 'auto' takes beyond 4,096 classes where dim holds the minimiser whatever it is.
    - ``variables``: 'balanced' or 'raw' (`Objective`).
    - ``start``: a name of STARTS; ``start_scale`` multiplies it.
    - ``restarts``: solve from so many seeds, problem.seed and on, and keep the best; needs a random
      start.
    - ``tol``: converged when |grad| <= tol max(sum of lambda |part|, mu); on spheres tol |Euclidean
      gradient|.
    - ``max_steps``: of this call and each restart (None: the method's). ``log_every``: steps
      between log points (None: log-spaced). ``learning_rate``, ``momentum``, ``history``: of the
      methods that have them.
    - ``log_metrics``: NC1 to NC3 at each log point, in ``history`` (None: where it costs little).
    - ``certificate``, ``metrics``: whether to make them; ``pairwise``: metrics over pairs of
      classes.
    """

    method: str = "auto"
    backend: str = "auto"
    mesh: str | None = None
    reduce: str = "auto"
    variables: str = "balanced"
    start: str = DEFAULT_START
    start_scale: float = 1.0
    restarts: int = 1
    tol: float = 1e-10
    max_steps: int | None = None
    log_every: int | None = None
    learning_rate: float | None = None
    momentum: float | None = None
    history: int | None = None
    log_metrics: bool | None = False
    certificate: bool = True
    metrics: bool = True
    pairwise: Pairwise = "auto"

    @classmethod
    def of(cls, **given: Any) -> SolveOptions:
        """From keywords. Errors: InputTypeError for a name that is no option."""
        known = [item.name for item in fields(cls)]
        for name in given:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"the options are {', '.join(known)}"
                raise InputTypeError(f"solve has no option {name!r}; {hint}")
        return cls(**given)

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        if not 0 < number(self.tol, "tol") < 1:
            raise InputError(f"tol must lie in (0, 1), got {self.tol}")
        for name, least in _LEAST.items():
            if getattr(self, name) is not None:
                whole(getattr(self, name), name, least)
        for name in ("learning_rate", "momentum", "history"):
            self._check_of_method(name)
        if self.momentum is not None and self.momentum >= 1:
            raise InputError(f"momentum must lie in (0, 1), got {self.momentum}")
        if not number(self.start_scale, "start_scale") > 0:
            raise InputError(f"start_scale must be > 0, got {self.start_scale}")
        if self.restarts > 1 and (self.start not in RANDOM_STARTS or self.method == "closed-form"):
            raise InputError(
                f"restarts = {self.restarts} need a random start; give start "
                f"{' or '.join(RANDOM_STARTS)}, not {self.start}, "
                "and an iterative method"
            )

    def _check_of_method(self, name: str) -> None:
        value, methods = (
            getattr(self, name),
            [method for method, row in METHODS.items() if name in row.options],
        )
        if value is not None and self.method not in methods:
            raise InputError(
                f"{name} goes with method {' or '.join(methods)}, not {self.method}; drop it"
            )
        if value is not None and not number(value, name) > 0:
            raise InputError(f"{name} must be > 0, got {value}")

    def check(self, problem: Problem) -> None:
        """What contradicts the problem. Errors: InputError naming the option; InputTypeError for
        something else.
        """
        if not isinstance(problem, Problem):
            raise InputTypeError(f"problem must be a Problem, got {type(problem).__name__}")
        refusal = METHODS[self.method].refuses(problem)
        if refusal:
            raise InputError(f"method {self.method} {refusal}")
        problem.reduction(self.reduce)
        make_backend(self.backend, problem.device, problem.torch_dtype, self.mesh)
