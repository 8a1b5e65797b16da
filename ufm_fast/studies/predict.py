"""What a cell will take, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ufm_fast.problem import Problem
from ufm_fast.studies.cells import Cell, problem_of


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak and seconds an evaluation. How many evaluations a solve takes is not predicted."""

    bytes: int
    seconds_per_evaluation: float | None


def predict(cell: Cell) -> Prediction:
    """The prediction for a cell. Errors: InputError where its settings can't be solved."""
    problem, config = problem_of(cell)
    return _of(problem, config)


def _of(problem: Problem, config: dict[str, Any]) -> Prediction:
    from ufm_fast.groups.planning import make_group_plan
    from ufm_fast.plan import make_plan
    from ufm_fast.runs.job import on_groups

    if on_groups(problem, config):
        return Prediction(make_group_plan(problem).memory, None)
    method = "lbfgs" if config["method"] in ("auto", "closed-form") else config["method"]
    plan = make_plan(problem, **{name: config[name] for name in ("reduce", "history", "certificate")}, method=method)
    wanted = "tiled" if config["backend"] == "auto" else config["backend"]
    backend = next((row for row in plan.backends if row.name == wanted), plan.backends[-1])
    return Prediction(plan.total(config["method"] if config["method"] == "auto" else method, backend.name), backend.seconds)
