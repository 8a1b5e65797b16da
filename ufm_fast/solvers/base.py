"""What a solver is: ``init`` and ``step`` under the one loop of ``minimise``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ufm_fast.objective import Evaluation, Objective
from ufm_fast.point import Point
from ufm_fast.sharded_starts import sharded_normal
from ufm_fast.solvers.solution import Outcome


@dataclass(frozen=True)
class State:
    """Where a solver stands. ``memory`` is the solver's own; ``outcome`` is set when it cannot go
    on. ``provisional``: the evaluation is of an easier objective, on the way to the one that is
    asked for, and decides nothing.
    """

    point: Point
    evaluation: Evaluation
    memory: Any = None
    outcome: Outcome | None = None
    message: str = ""
    provisional: bool = False


class Solver(Protocol):
    """A method. It touches vectors only through Point, and the problem only through Objective."""

    name: str
    max_steps: int

    def init(self, objective: Objective, point: Point) -> State:
        """State at the initial point."""

    def step(self, objective: Objective, state: State) -> State:
        """One iteration. A state whose ``outcome`` is set holds the best point that was found."""


@dataclass(frozen=True)
class Progress:
    """Notices when neither the value falls by more than its rounding nor the gradient's norm by a
    tenth any more.
    """

    value: float = float("inf")
    size: float = float("inf")
    idle: int = 0

    def update(self, objective: Objective, evaluation: Evaluation, size: float) -> Progress:
        """After a step; slow progress adds up, for the marks move only when they are beaten."""
        lower = evaluation.value < self.value - rounding(objective, evaluation.value)
        smaller = size < 0.9 * self.size
        value, least = (evaluation.value if lower else self.value), (size if smaller else self.size)
        return Progress(value, least, 0 if lower or smaller else self.idle + 1)


def rounding(objective: Objective, value: float) -> float:
    """Size of the rounding error of a value of the objective: below it a comparison of values says
    nothing.
    """
    dtype = objective.problem.torch_dtype
    eps = torch.finfo(dtype).eps
    # Sums run in float64, so only the products' rounding is the dtype's, and it averages out over
    # the terms.
    return abs(value) * (1e-13 if dtype == torch.float64 else 0.1 * eps) + objective.value_floor


def gradient_floor(objective: Objective, point: Point) -> float:
    """Size of the rounding error of a gradient: the data and penalty parts cancel at a minimum, and
    each carries eps.
    """
    return torch.finfo(objective.problem.torch_dtype).eps * objective.gradient_scale(point)


def _random(x: Point) -> Point:
    """A normal direction."""
    if x.layout is not None:
        return sharded_normal(x)
    generator = torch.Generator().manual_seed(0)
    return x.map(
        lambda part: torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)
    )


def largest_curvature(objective: Objective, x: Point, steps: int = 12) -> float:
    """Estimate of the Hessian's largest absolute eigenvalue at x by power iterations (an estimate
    from below).
    """
    size, v = 0.0, _random(x)
    v = objective.geometry.tangent(x, v)
    for _ in range(steps):
        v = v.scale(1.0 / max(v.norm(), 1e-300))
        v = objective.hvp(x, v)
        size = v.norm()
    return size
