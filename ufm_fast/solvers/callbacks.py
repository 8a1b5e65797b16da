"""What a solve tells while it runs: ``solve(problem, callbacks=[...])`` calls them in their order.

class Print(Callback):
    def log(self, record, point):
        print(record.step, record.value, record.metrics)

A callback sees and changes nothing. What it raises ends the solve as any error does, after the
state was saved; to stop a solve and keep its solution, raise KeyboardInterrupt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ufm_fast.point import Point
from ufm_fast.solvers.solution import StepRecord

if TYPE_CHECKING:
    from ufm_fast.solvers.solution import Solution

#: Called with a record and a function that gives the model's Point.
OnPoint = Callable[[StepRecord, Callable[[], Point]], None]
#: What a solve does, in order; 'steps' begins anew for each of several starts.
PHASES = ("start", "steps", "certificate", "metrics")


class Callback:
    """The protocol: override what is wanted."""

    def phase(self, name: str) -> None:
        """One of PHASES begins."""

    def log(self, record: StepRecord, point: Callable[[], Point]) -> None:
        """A log point; ``point()`` gives the model's Point."""

    def step(self, step: int, value: float, gradient_norm: float) -> None:
        """A step has been taken; of several starts they are numbered through."""

    def end(self, solution: Solution) -> None:
        """The solve has ended, and this is its result."""


class Callbacks(Callback):
    """Several as one."""

    def __init__(self, parts: Sequence[Callback]) -> None:
        self.parts = tuple(parts)

    def phase(self, name: str) -> None:
        for part in self.parts:
            part.phase(name)

    def log(self, record: StepRecord, point: Callable[[], Point]) -> None:
        for part in self.parts:
            part.log(record, point)

    def step(self, step: int, value: float, gradient_norm: float) -> None:
        for part in self.parts:
            part.step(step, value, gradient_norm)

    def end(self, solution: Solution) -> None:
        for part in self.parts:
            part.end(solution)


class OnLog(Callback):
    """A function that is called at log points."""

    def __init__(self, function: OnPoint) -> None:
        self.function = function

    def log(self, record: StepRecord, point: Callable[[], Point]) -> None:
        self.function(record, point)
