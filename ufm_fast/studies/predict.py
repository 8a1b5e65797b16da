"""What a cell will take, before it runs. How many evaluations a solve takes is not predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ufm_fast.problem import Problem


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak; seconds and floating-point operations of an evaluation (None, 0: solved on
    groups, in seconds).
    """

    bytes: int
    seconds_per_evaluation: float | None = None
    flops: float = 0.0


def predict(problem: Problem, config: dict[str, Any]) -> Prediction:
    """The prediction for a cell, by `plan`, from its problem and its resolved settings."""
    from ufm_fast.groups.planning import make_group_plan
    from ufm_fast.plan import make_plan
    from ufm_fast.runs.job import on_groups

    if on_groups(problem, config):
        return Prediction(make_group_plan(problem).memory)
    method = "auto" if config["method"] == "closed-form" else config["method"]
    names = ("reduce", "history", "variables", "certificate")
    plan = make_plan(problem, **{name: config[name] for name in names}, method=method)
    wanted = "tiled" if config["backend"] == "auto" else config["backend"]
    backend = next((row for row in plan.backends if row.name == wanted), plan.backends[-1])
    return Prediction(plan.total(method, backend.name), backend.seconds, plan.flops)
