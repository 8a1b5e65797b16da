"""The default method: L-BFGS, and Newton-CG to finish where L-BFGS stalls short of the tolerance or
takes too long.

Decisions

2026-11-25. L-BFGS hands over to Newton-CG after 500 steps where d >= K - 1. With label smoothing, d
= K and penalties of 1e-6 its paired preconditioner is worse than none, and 20,000 steps did not
converge; Newton-CG ends those within 50 steps (`tests/solvers/test_methods.py`), and imbalanced
squared errors sooner too. With d < K - 1, where a softmax problem is not convex, it took more
evaluations than L-BFGS, so there nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import State
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.newton_cg import NewtonCG

#: Steps after which L-BFGS hands over where d >= K - 1: what it has not solved by then has more
#: curvatures than its memory.
PATIENCE = 500


@dataclass(frozen=True)
class _Memory:
    finishing: bool
    inner: Any
    steps: int = 0


class LBFGSThenNewton:
    """A stalled L-BFGS has lost the value's digits, not the gradient's: Newton's steps are judged
    by the gradient there.
    """

    name = "lbfgs+newton-cg"

    def __init__(self, history: int = 10, max_steps: int = 20000, patience: int = PATIENCE) -> None:
        self.patience = patience
        self.first, self.second = LBFGS(history), NewtonCG()
        self.max_steps = max_steps

    def init(self, objective: Objective, point: Point) -> State:
        state = self.first.init(objective, point)
        return replace(state, memory=_Memory(False, state.memory))

    def step(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        solver = self.second if memory.finishing else self.first
        after = solver.step(objective, replace(state, memory=memory.inner))
        steps = memory.steps + 1
        # With fewer dimensions the problem is not convex, and Newton's steps are many products each
        # and few of them good.
        convex = objective.problem.dim >= objective.problem.num_classes - 1
        if not memory.finishing and (
            after.outcome is not None or (convex and steps >= self.patience)
        ):
            fresh = self.second.init(objective, after.point)
            return replace(fresh, memory=_Memory(True, fresh.memory))
        return replace(after, memory=_Memory(memory.finishing, after.memory, steps))
