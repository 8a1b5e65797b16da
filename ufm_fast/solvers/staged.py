"""Continuation: easier objectives first, each started where the one before ended, the objective
itself last.

**ReLU.** Its minimisers lie on its kinks: at deep neural collapse the off-class units stand exactly
at zero, where the ReLU has no gradient that a line search could use, and L-BFGS on the exact
function stops 1e-7 above the minimum. So it runs on max(z, 0) rounded by e = 1e-1, 1e-2, .., 1e-8
(`trunks.ReLU`), up to 300 steps each, and last on the exact one. What stationary means at a kink:
the gradients of the rounded functions are averages of gradients near the point, so one that
vanishes at e = 1e-8 puts zero into the Goldstein subdifferential of that size. A point that passes
this, or whose exact gradient vanishes, has converged; one where the last stage ended short of it
has the outcome ``kink``, which is no success.

**Angles.** Margins in the angle have a kink where minima lie, too (`angular_margins`). Their
rounding goes down to e = 1e-5 only, for its curvature, 1/e, is that by which the rounding of a
point makes a gradient wrong. Then rows within 100 e of their class's row are put on it, where they
are held together, and the exact loss, smooth along that, is solved to the same tolerance as any.

**Spheres.** A high temperature makes plateaus, a low one hides how far codes have to be apart. With
d >= K - 1 the temperature rises, 10, 30, t; with K > d + 1 a start meets the best code most often
at 10 to 15, so it begins there and doubles up to t, or goes down to it in one step (arXiv
2310.05351 has the model; the schedule is ours).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ufm_fast.geometries import TiedSpheres
from ufm_fast.objective import Objective
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.solvers.base import Solver, State
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.solution import Outcome

#: Rounding of each stage of a ReLU, in the solver's units, before the exact one.
ROUNDINGS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
#: Those of the kinks of angular margins, and how many times the last rows are apart that belong
#: together.
ANGLES, NEAR = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5), 100.0
STAGE_STEPS = 300
#: Temperature at which a code is looked for.
CODE_TEMPERATURE = 12.0


@dataclass(frozen=True)
class _Memory:
    stage: int
    inner: Any
    steps: int = 0
    solved: bool = False  # the stage before ended within tol


class Staged:
    """L-BFGS on each stage, then ``last`` on the objective. The state's evaluation is of the stage
    that it is in.
    """

    def __init__(self, first: LBFGS, last: Solver, tol: float, max_steps: int = 20000) -> None:
        self.first, self.last, self.tol, self.max_steps = first, last, tol, max_steps
        self.name = f"staged: {last.name}"

    def stages(self, objective: Objective) -> Sequence[Objective]:
        """The easier objectives, in order."""
        raise NotImplementedError

    def init(self, objective: Objective, point: Point) -> State:
        return self._enter(objective, point, 0, solved=False)

    def _enter(self, objective: Objective, point: Point, stage: int, *, solved: bool) -> State:
        """The beginning of the first stage from there on that is not solved by the point
        already.
        """
        stages = self.stages(objective)
        for j in range(stage, len(stages)):
            state = self.first.init(stages[j], point)
            if not self._is_solved(stages[j], state):
                return replace(state, memory=_Memory(j, state.memory, 0, solved), provisional=True)
            solved = True
        state = self.last.init(objective, self.entered(objective, point))
        return replace(state, memory=_Memory(len(stages), state.memory, 0, solved))

    def entered(self, objective: Objective, point: Point) -> Point:
        """Where the last stage begins, from the point that the stage before ended at."""
        return point

    def _is_solved(self, objective: Objective, state: State) -> bool:
        return state.evaluation.gradient.norm() <= self.tol * objective.gradient_scale(state.point)

    def step(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        stages = self.stages(objective)
        if memory.stage == len(stages):
            after = self.last.step(objective, replace(state, memory=memory.inner))
            return self.judged(
                objective,
                replace(after, memory=replace(memory, inner=after.memory, steps=memory.steps + 1)),
            )
        staged = stages[memory.stage]
        after = self.first.step(staged, replace(state, memory=memory.inner))
        solved = self._is_solved(staged, after)
        if solved or after.outcome is not None or memory.steps + 1 >= STAGE_STEPS:
            return self._enter(objective, after.point, memory.stage + 1, solved=solved)
        return replace(
            after,
            memory=replace(memory, inner=after.memory, steps=memory.steps + 1),
            provisional=True,
        )

    def judged(self, objective: Objective, state: State) -> State:
        """A state of the last stage, whose outcome may be another than its solver's."""
        return state


class RoundedKinks(Staged):
    """Stages of ever less rounded kinks; the exact one gets ``last_steps``."""

    kinks: Sequence[float] = ROUNDINGS
    of, last_steps = "the ReLU", STAGE_STEPS

    def __init__(self, history: int, last: Solver, tol: float) -> None:
        super().__init__(LBFGS(history), last, tol)
        self.name = f"rounded {self.of.split()[-1].lower()}: {last.name}"

    def stages(self, objective: Objective) -> Sequence[Objective]:
        return [objective.rounded(e) for e in self.kinks]

    def judged(self, objective: Objective, state: State) -> State:
        memory: _Memory = state.memory
        if state.outcome is None and memory.steps < self.last_steps:
            return state
        if self._is_solved(objective, state):
            return replace(state, outcome=None)
        if memory.solved:
            words = f"stationary with the kinks rounded by {self.kinks[-1]:g}"
            return replace(state, outcome=Outcome.CONVERGED, message=words)
        return replace(
            state,
            outcome=Outcome.KINK,
            message=f"stopped at a kink of {self.of}; try other seeds (restarts)",
        )


class RoundedAngles(RoundedKinks):
    """Before the angles' stages those of other temperatures, as much rounded as the first."""

    kinks: Sequence[float] = ANGLES
    of, last_steps = "the angles", 20 * STAGE_STEPS

    def stages(self, objective: Objective) -> Sequence[Objective]:
        warm = [objective.tempered(t).rounded(ANGLES[0]) for t in temperatures(objective.problem)]
        return [*warm, *super().stages(objective)]

    def entered(self, objective: Objective, point: Point) -> Point:
        assert isinstance(objective.geometry, TiedSpheres)
        # of a class without a margin as good a start
        return objective.geometry.joined(point, NEAR * ANGLES[-1])


class Tempered(Staged):
    """Stages of other temperatures (`temperatures`)."""

    def __init__(self, history: int, last: Solver, tol: float) -> None:
        super().__init__(LBFGS(history), last, tol)
        self.name = f"tempered: {last.name}"

    def stages(self, objective: Objective) -> Sequence[Objective]:
        return [objective.tempered(t) for t in temperatures(objective.problem)]


def temperatures(problem: Problem) -> list[float]:
    """Temperatures to solve at before the problem's own t; none where a random start does well at
    once.
    """
    t = problem.temperature
    if problem.dim >= problem.num_classes - 1:
        return [x for x in (10.0, 30.0) if x < t / 1.5] if t > 15.0 else []
    if 10.0 <= t <= 15.0:
        return []
    found = [CODE_TEMPERATURE]
    while found[-1] * 2.0 < t:
        found.append(found[-1] * 2.0)
    return found
