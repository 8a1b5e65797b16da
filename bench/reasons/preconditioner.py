"""Gradient evaluations of L-BFGS with and without the paired model, to a relative gradient of
3e-10. No clock.

Cross-entropy with counts log-spaced 1..500, lambda_W = 1e-3, lambda_H = lambda_W / N, float64.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.solve_time import problem
from bench.table import Record
from ufm_fast import Objective
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.minimise import minimise
from ufm_fast.starts import make_start
from ufm_fast.theory.certificates import certify


def records(classes: int = 200, dim: int = 256) -> Iterator[Record]:
    case = problem("imbalanced", classes, dim)
    for start in ("spectral", "normal"):
        for precondition, history in ((False, 10), (False, 20), (True, 5), (True, 10), (True, 20)):
            objective = Objective(case)
            point = make_start(objective, start)
            run = minimise(objective, LBFGS(history, precondition=precondition), point, tol=3e-10)
            gap = certify(case, objective.rows, objective.to_model(run.state.point)).relative_gap
            yield Record(
                {"K": classes, "d": dim, "start": start, "pairs": history},
                {
                    "steps": run.steps,
                    "evaluations": objective.evaluations,
                    "ended": run.outcome.value,
                    "gap": f"{gap:.1e}",
                },
                "paired" if precondition else "identity",
            )
