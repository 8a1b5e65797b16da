"""Gradient evaluations of the squared error with and without the model of `curvature.squares`. No
clock.

    python bench/squared_model.py [--out FILE.csv]

Twelve classes of 1 to 100 samples, d = 11, 12 and 5, a free bias and none, lambda_W = lambda_H from
1e-5 to 1e-8, float64, a random start, L-BFGS with its Newton-CG finish.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, write_csv

from ufm_fast import Problem, solve
from ufm_fast.solvers.curvature import squares

COUNTS = [3, 100, 30, 1, 5, 1, 5, 1, 100, 100, 2, 1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    print(environment())
    rows = []
    for dim, bias in ((12, "none"), (12, "free"), (11, "free"), (5, "free")):
        for penalty in (1e-5, 1e-6, 1e-7, 1e-8):
            problem = Problem(
                counts=COUNTS, dim=dim, loss="mse", bias=bias, lambda_w=penalty, lambda_h=penalty
            )
            found = {}
            for name in ("identity", "squared_model"):
                serves = (
                    squares.Squares.serves
                    if name == "squared_model"
                    else lambda row, objective: False
                )
                with patch.object(squares.Squares, "serves", serves):
                    found[name] = solve(problem, start="normal", metrics=False)
            rows.append(
                {
                    "dim": dim,
                    "bias": bias,
                    "penalty": penalty,
                    **{f"evaluations, {name}": s.evaluations for name, s in found.items()},
                    **{f"value, {name}": f"{s.value:.10e}" for name, s in found.items()},
                }
            )
            print(rows[-1], flush=True)
    if args.out:
        write_csv(args.out, rows)


if __name__ == "__main__":
    main()
