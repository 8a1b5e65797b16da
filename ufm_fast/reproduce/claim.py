"""What a row of the table of claims is, and how a measurement is judged by it.

A row fails closed: a quantity that was declared and not measured fails, and one that was measured
and not declared is an error. Nothing passes without a theory value or a bound; a row that has
neither anywhere is a REPORT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PASS, FAIL, REPORT = "PASS", "FAIL", "REPORT"
#: How a quantity's deviation is formed from (measured, theory); it passes where that is at most the
#: tolerance.
RELATIONS: dict[str, Callable[[float, float], float]] = {
    "relative": lambda measured, theory: abs(measured - theory) / abs(theory),
    "absolute": lambda measured, theory: abs(measured - theory),
    "at most": lambda measured, theory: max(measured - theory, 0.0),
    "at least": lambda measured, theory: max(theory - measured, 0.0),
}


@dataclass(frozen=True)
class Quantity:
    """One number of a claim. theory: None where there is none, then it is reported. tolerance: of
    the relation's deviation.

    quick: whether the quick setting measures it. quick_tolerance: for that setting where it needs
    another.
    """

    name: str
    theory: float | None = None
    tolerance: float = 0.0
    relation: str = "relative"
    quick: bool = True
    quick_tolerance: float | None = None

    def judge(self, measured: float | None, quick: bool) -> Judgement:
        if self.theory is None:
            return Judgement(self, measured, None, FAIL if measured is None else REPORT)
        if measured is None or not math.isfinite(measured):
            return Judgement(self, measured, None, FAIL)
        tolerance = (
            self.quick_tolerance if quick and self.quick_tolerance is not None else self.tolerance
        )
        deviation = RELATIONS[self.relation](measured, self.theory)
        return Judgement(
            self, measured, deviation, PASS if deviation <= tolerance else FAIL, tolerance
        )


@dataclass(frozen=True)
class Judgement:
    """A quantity, what was measured (None: nothing), its deviation from theory, and the state."""

    quantity: Quantity
    measured: float | None
    deviation: float | None
    state: str
    tolerance: float | None = None

    @property
    def strain(self) -> float:
        """How near to failing: the largest is the one that a verdict shows."""
        if self.state == FAIL:
            return math.inf
        if self.deviation is None or self.tolerance is None:
            return -1.0
        return self.deviation / self.tolerance if self.tolerance else 0.0


@dataclass(frozen=True)
class Evidence:
    """What a claim's function measured: numbers by the names of its quantities, a table for the
    CSV, and its figure.
    """

    numbers: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]
    figure: Figure


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    claim: in one sentence. papers: the paper's own setting, as far as it is known. ours: our
    choice. quick: what the quick setting changes. measure(quick) does the work. seconds and
    quick_seconds: upper figures on one thread of a two-core machine, to choose rows by; what a row
    took stands in its verdict.
    """

    name: str
    paper: str
    claim: str
    papers: str
    ours: str
    quantities: tuple[Quantity, ...]
    measure: Callable[[bool], Evidence] = field(repr=False)
    seconds: float
    quick: str = "the same"
    quick_seconds: float | None = None

    def expected_seconds(self, quick: bool) -> float:
        return self.quick_seconds if quick and self.quick_seconds is not None else self.seconds

    def judge(self, numbers: Mapping[str, float], quick: bool) -> list[Judgement]:
        """One judgement for each quantity that the setting measures. Errors: KeyError for a number
        that was not declared.
        """
        wanted = [q for q in self.quantities if q.quick or not quick]
        undeclared = set(numbers) - {q.name for q in wanted}
        if undeclared:
            raise KeyError(
                f"claim {self.name} declares no quantity {', '.join(sorted(undeclared))}"
            )
        return [q.judge(numbers.get(q.name), quick) for q in wanted]
