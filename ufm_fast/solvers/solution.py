"""What a solve returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from ufm_fast.errors import InputError
from ufm_fast.point import Point
from ufm_fast.problem import Problem
from ufm_fast.theory.separation import predicted_frame

if TYPE_CHECKING:
    from ufm_fast.theory import ClosedForm
    from ufm_fast.theory.certificates import Certificate
    from ufm_fast.theory.structures import Structure


_NO_CERTIFICATE = {
    "kind": "none",
    "certified": False,
    "lower_bound": None,
    "relative_gap": None,
    "spectral_ratio": None,
    "reason": "not asked for, or the point is not finite",
}


class Outcome(str, Enum):
    """How a solve ended. ``success`` decides the command line's exit code."""

    CONVERGED = "converged"
    KINK = "kink"  # stopped at a kink of the ReLU, short of a stationary point
    STALLED = "stalled"  # no step improves the value beyond rounding: as good as the dtype allows
    MAX_STEPS = "max_steps"
    DIVERGED = "diverged"
    INTERRUPTED = "interrupted"

    @property
    def success(self) -> bool:
        return self in (Outcome.CONVERGED, Outcome.STALLED)


@dataclass(frozen=True)
class Effort:
    """What runs have spent: steps, gradient-equivalents, seconds."""

    steps: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Restart:
    """One of several starts: its seed, where it ended, what it took; ``rank`` of the logits (None:
    diverged).
    """

    seed: int
    value: float
    steps: int
    evaluations: float
    rank: int | None
    outcome: str


@dataclass(frozen=True)
class Starts:
    """How far several starts have come: ``done`` has a row for each that has ended, and the point
    that is saved beside it is of the next one where it is ``pending``, else the best of those.
    """

    done: tuple[Restart, ...] = ()
    pending: bool = True


@dataclass(frozen=True)
class StepRecord:
    """One log point. ``gradient_norm`` is in the variables that the solver works in;
    ``evaluations`` are gradient-equivalents (a Hessian product counts as two); ``seconds`` since
    the solve began, earlier runs included;
    ``metrics``: NC1 to NC3, with the option log_metrics.
    """

    step: int
    value: float
    data_value: float
    gradient_norm: float
    evaluations: float
    seconds: float
    accuracy: float | None = None
    margin_min: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """All numbers by their names, as a line of a log has them."""
        own = {
            item.name: getattr(self, item.name) for item in fields(self) if item.name != "metrics"
        }
        return {**own, **self.metrics}


@dataclass(frozen=True)
class Solution:
    """A solved (or interrupted) problem.

    ``point`` holds the model's W (K x d), b, hidden layers, and H with one row for each row of
    ``reduce`` (a class, or a sample); ``lifted()`` has all N rows. ``restarts``: a row for each of
    several starts, of which this is the best. ``theory`` and ``certificate`` are None where there
    is none. ``notes``: what the numbers do not tell, in words.
    ``structure``: one that is known but not proved to be the minimum, where theory is None and the
    value is its.
    ``phases``: seconds by phase, of a solve with a Stopwatch.
    """

    problem: Problem
    point: Point
    value: float
    data_value: float
    gradient_norm: float
    steps: int
    evaluations: float
    seconds: float
    outcome: Outcome
    message: str
    method: str
    backend: str
    reduce: str
    variables: str
    start: str
    theory: ClosedForm | None = None
    certificate: Certificate | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[StepRecord] = field(default_factory=list)
    restarts: tuple[Restart, ...] = ()
    notes: list[str] = field(default_factory=list)
    structure: Structure | None = None
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        return self.outcome.success

    def lifted(self) -> Point:
        """W, b and the features of all N samples (N x d), in the order of ``problem.sample_labels``
        or target sets.
        """
        if self.reduce == "none":
            return self.point
        if self.point.layout is not None:
            raise InputError(
                "a point that is spread over ranks has no rows of all samples; load its "
                "checkpoint in one process"
            )
        rows = self.problem.sample_row().to(self.point.H.device)
        return replace(self.point, H=self.point.H.index_select(0, rows))

    def summary(self) -> dict[str, Any]:
        """The scalar results as a JSON-ready dictionary; the command line's ``--json`` prints
        it.
        """
        theory = None
        if self.theory is not None:
            theory = {"value": self.theory.value, "source": self.theory.source}
        return {
            "outcome": self.outcome.value,
            "message": self.message,
            "value": self.value,
            "data_value": self.data_value,
            "gradient_norm": self.gradient_norm,
            "steps": self.steps,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "backend": self.backend,
            "method": self.method,
            "reduce": self.reduce,
            "variables": self.variables,
            "start": self.start,
            "theory": theory,
            "certificate": _NO_CERTIFICATE
            if self.certificate is None
            else self.certificate.summary(),
            "metrics": self.metrics,
            "restarts": [asdict(row) for row in self.restarts],
            "classes": self.problem.num_classes,
            "samples": self.problem.num_samples,
            "dim": self.problem.dim,
            "frame": predicted_frame(self.problem.kind),
            "empty_classes": int((self.problem.counts == 0).sum()),
            "notes": self.notes,
            "structure": None if self.structure is None else asdict(self.structure),
            **({"phases": self.phases} if self.phases else {}),
        }
