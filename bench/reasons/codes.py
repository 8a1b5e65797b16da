"""Evaluations of penalised cross-entropy with K > d + 1, with and without the model of
`curvature.codes`. No clock but a ratio.

lambda_W = 1e-3, lambda_H = 1e-3 / N, start `normal`, until |grad| <= 1e-6 mu: L-BFGS with 10 pairs,
or by ``--method auto`` with the finish by Newton-CG where it stalls. ``--only WORD``: cases whose
name holds it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest.mock import patch

import torch

from bench.table import Record
from ufm_fast import Problem
from ufm_fast.objective import Objective
from ufm_fast.solvers.auto import LBFGSThenNewton
from ufm_fast.solvers.curvature.codes import Codes
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.starts import make_start

CASES = {
    "200, 32, balanced": {"classes": 200, "dim": 32, "per_class": 1},
    "200, 32, counts 1..500": {"dim": 32, "counts": torch.logspace(0, 2.7, 200).round().long()},
    "500, 32, balanced": {"classes": 500, "dim": 32, "per_class": 1},
}
METHODS = {"lbfgs": LBFGS, "auto": LBFGSThenNewton}


def run(problem: Problem, most: float, method: str) -> dict[str, object]:
    objective = Objective(problem)
    solver = METHODS[method]()
    started = time.perf_counter()
    state = solver.init(objective, make_start(objective, "normal"))
    goal = 1e-6 * problem.mu
    while (
        state.evaluation.gradient.norm() > goal
        and objective.evaluations < most
        and state.outcome is None
    ):
        state = solver.step(objective, state)
    seconds = time.perf_counter() - started
    return {
        "evaluations": objective.evaluations,
        "gradient_over_mu": f"{state.evaluation.gradient.norm() / problem.mu:.2e}",
        "value": f"{state.evaluation.value:.10f}",
        "evaluations_a_second": f"{objective.evaluations / seconds:.1f}",
    }


def records(
    most: float = 6000.0, models: str = "identity,codes", method: str = "lbfgs", only: str = ""
) -> Iterator[Record]:
    for name, data in CASES.items():
        if only not in name:
            continue
        N = int(data["counts"].sum()) if "counts" in data else data["classes"]
        problem = Problem(**data, lambda_w=1e-3, lambda_h=1e-3 / N)
        for model in models.split(","):
            with patch.object(
                Codes, "serves", Codes.serves if model == "codes" else lambda row, objective: False
            ):
                case = {"case": name, "most": f"{most:g}", "method": method}
                yield Record(case, run(problem, most, method), model)
