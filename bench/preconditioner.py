"""Gradient evaluations of L-BFGS with and without the paired model, to a relative gradient of
3e-10. No clock.

    python bench/preconditioner.py [--classes 200] [--dim 256] [--out FILE.csv]

Cross-entropy with counts log-spaced 1..500, lambda_W = 1e-3, lambda_H = lambda_W / N, float64.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, write_csv
from solve_time import problem

from ufm_fast import Objective
from ufm_fast.solvers.lbfgs import LBFGS
from ufm_fast.solvers.minimise import minimise
from ufm_fast.starts import make_start
from ufm_fast.theory.certificates import certify


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(environment())
    case, rows = problem("imbalanced", args.classes, args.dim), []
    for start in ("spectral", "normal"):
        for precondition, history in ((False, 10), (False, 20), (True, 5), (True, 10), (True, 20)):
            objective = Objective(case)
            point = make_start(objective, start)
            run = minimise(objective, LBFGS(history, precondition=precondition), point, tol=3e-10)
            gap = certify(case, objective.rows, objective.to_model(run.state.point)).relative_gap
            model = "paired" if precondition else "identity"
            row = {
                "K": args.classes,
                "d": args.dim,
                "start": start,
                "model": model,
                "pairs": history,
                "steps": run.steps,
            }
            rows.append(
                {
                    **row,
                    "evaluations": objective.evaluations,
                    "ended": run.outcome.value,
                    "gap": f"{gap:.1e}",
                }
            )
            print(rows[-1], flush=True)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
