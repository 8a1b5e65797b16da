"""What a closed form says, and what its rows are built from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ufm_fast.problem import Problem
from ufm_fast.theory.frames import GroupedLogits, Logits, Parameters


@dataclass(frozen=True, eq=False)
class ClosedForm:
    """The minimum of f, where it comes from, and how to build a minimiser.

    `collapsed`: W = H = 0 is the minimiser (a bias may remain). `logits`: the spectrum that `point`
    is built from.
    """

    value: float
    source: str
    collapsed: bool
    logits: Logits

    def point(self) -> Parameters:
        """A minimiser (W of K x d, class means of K x d, b or None), float64 on the CPU.

        Empty classes have zero rows. For pick-all the second item has a row for each distinct
        target set instead.
        """
        return self.logits.point()

    def hidden(self) -> tuple[Tensor, ...]:
        """The minimiser's hidden layers W_1 .. W_(M-1); none of one layer."""
        return self.logits.hidden()


#: Relative gap up to which a value that was found by iteration counts as the minimum.
PROVED = 1e-10


def proved(value: float, shortfall: float) -> bool:
    """Whether a value found by iteration is the minimum: ``shortfall``, by duality, is what it may
    lie above it.
    """
    return shortfall <= PROVED * value


def class_counts(problem: Problem) -> Tensor:
    counts: Tensor = problem.counts.cpu()
    return counts


def grouped(problem: Problem, **spectrum: Any) -> GroupedLogits:
    return GroupedLogits(
        dim=problem.dim,
        counts=class_counts(problem),
        lambda_w=problem.lambda_w,
        lambda_h=problem.lambda_h,
        **spectrum,
    )
