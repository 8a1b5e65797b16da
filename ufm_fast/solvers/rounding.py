"""ReLU's minimisers lie on its kinks: they are approached with the kinks rounded, ever less, and then judged with them.

At deep neural collapse the off-class units stand exactly at zero, where the ReLU has no gradient that a line search could
use, and L-BFGS on the exact function stops 1e-7 above the minimum. So it runs on max(z, 0) rounded by e = 1e-1, 1e-2, ..,
1e-8 (`trunks.ReLU`), up to 300 steps each, warm started, and last on the exact one.

What stationary means at a kink: the gradients of the rounded functions are averages of gradients near the point, so one that
vanishes at e = 1e-8 puts zero into the Goldstein subdifferential of that size. A point that passes this, or whose exact
gradient vanishes, has converged; one where the last stage ended short of it has the outcome ``kink``, which is no success.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.solvers.base import State
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.solution import Outcome

#: Rounding of each stage in the solver's units, 0 for the exact ReLU.
STAGES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 0.0)
STAGE_STEPS = 300


@dataclass(frozen=True)
class _Memory:
    stage: int
    inner: Any
    steps: int = 0
    smooth: bool = False  # the last rounded stage ended within tol


class RoundedReLU:
    """L-BFGS through STAGES. The state's evaluation is of the stage that it is in; the last one is the exact objective's."""

    name = "rounded relu: lbfgs"

    def __init__(self, history: int = 10, tol: float = 1e-10, max_steps: int = 20000) -> None:
        self.inner, self.tol, self.max_steps = LBFGS(history), tol, max_steps

    def init(self, objective: Objective, point: Point) -> State:
        return self._enter(objective, point, 0, smooth=False)

    def _enter(self, objective: Objective, point: Point, stage: int, *, smooth: bool) -> State:
        """The beginning of the first stage from there on that is not solved by the point already."""
        while True:
            state = self.inner.init(_staged(objective, stage), point)
            if stage == len(STAGES) - 1 or not self._solved(objective, state, stage):
                return replace(state, memory=_Memory(stage, state.memory, 0, smooth))
            stage, smooth = stage + 1, True

    def _solved(self, objective: Objective, state: State, stage: int) -> bool:
        staged = _staged(objective, stage)
        return state.evaluation.gradient.norm() <= self.tol * staged.gradient_scale(state.point)

    def step(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        staged = _staged(objective, memory.stage)
        after = self.inner.step(staged, replace(state, memory=memory.inner))
        steps, last = memory.steps + 1, memory.stage == len(STAGES) - 1
        solved = self._solved(objective, after, memory.stage)
        if last:
            over = after.outcome is not None or steps >= STAGE_STEPS
            kept = replace(after, outcome=None, memory=replace(memory, inner=after.memory, steps=steps))
            return self._ended(kept, smooth=memory.smooth) if over and not solved else kept
        if solved or after.outcome is not None or steps >= STAGE_STEPS:
            return self._enter(objective, after.point, memory.stage + 1, smooth=solved)
        return replace(after, memory=replace(memory, inner=after.memory, steps=steps))

    @staticmethod
    def _ended(state: State, *, smooth: bool) -> State:
        if smooth:
            return replace(state, outcome=Outcome.CONVERGED, message=f"stationary with kinks rounded by {STAGES[-2]:g}")
        return replace(state, outcome=Outcome.KINK, message="stopped at a kink of the ReLU; try other seeds (restarts)")


def _staged(objective: Objective, stage: int) -> Objective:
    return objective.rounded(STAGES[stage]) if STAGES[stage] else objective
